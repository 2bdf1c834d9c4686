"""The compiled peer's BERT layers: over whole sequences, and one cached token at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.models.mplug2.config import TextConfig


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """`(batch, tokens, parts·D)` to `(parts, batch, heads, tokens, head_dim)`."""
    return x.view(*x.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Embeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, dim)
        self.position = nn.Embedding(config.max_position_embeddings, dim)
        self.token_type = nn.Embedding(config.type_vocab_size, dim)
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.dropout(self.norm(self.word(tokens) + self.position(positions) + self.token_type.weight[0]))


class Layer(nn.Module):
    """A post-norm BERT layer, with cross-attention or without."""

    def __init__(self, config: TextConfig, *, cross_attention: bool = True) -> None:
        super().__init__()
        dim, self.heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        self.attention_dropout = config.attention_probs_dropout_prob
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.qkv, self.out, self.norm1 = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.LayerNorm(dim, eps=eps)
        self.has_cross = cross_attention
        if cross_attention:
            self.cross_q, self.cross_kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
            self.cross_out, self.norm2 = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=eps)
        self.fc, self.proj = nn.Linear(dim, config.intermediate_size), nn.Linear(config.intermediate_size, dim)
        self.norm3 = nn.LayerNorm(dim, eps=eps)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return merge_heads(out)

    def after_self_attention(self, x: Tensor, context: Tensor) -> Tensor:
        return self.norm1(x + self.dropout(self.out(context)))

    def cross_attend(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query = split_heads(self.cross_q(x), 1, self.heads)[0]
        return self.norm2(x + self.dropout(self.cross_out(self.attend(query, key, value, mask))))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.norm3(x + self.dropout(self.proj(F.gelu(self.fc(x)))))

    def forward(
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Without a memory the cross-attention is left out. mask `(batch, 1, 1, tokens)`: which of x are seen."""
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        x = self.after_self_attention(x, self.attend(q, k, v, mask, causal))
        if memory is not None:
            key, value = split_heads(self.cross_kv(memory), 2, self.heads)
            x = self.cross_attend(x, key, value, None)
        return self.feed_forward(x)

    def allocate(self, batch: int, beams: int, steps: int, tokens: int) -> None:
        """Static caches, reused by all videos of these sizes."""
        head_dim = self.out.in_features // self.heads
        like = self.out.weight.detach()
        own = like.new_zeros(2, batch * beams, self.heads, steps, head_dim)
        memory = like.new_zeros(2, batch, self.heads, tokens, head_dim)
        for name, cache in (("own", own), ("memory", memory)):
            if like.is_cuda:  # a CUDA graph takes buffers where they are
                self.register_buffer(name, cache, persistent=False)
            else:  # a frozen graph would take buffers for constants
                setattr(self, name, cache)

    def remember(self, memory: Tensor) -> None:
        self.memory.copy_(split_heads(self.cross_kv(memory), 2, self.heads))

    def step(self, x: Tensor, step: Tensor, seen: Tensor, origin: Tensor, memory_mask: Tensor | None) -> Tensor:
        """x `(batch, beams, D)` at position `step` `(1,)`; seen `(1, steps)`; origin: each row's row one step ago."""
        batch, beams, dim = x.shape
        q, k, v = split_heads(self.qkv(x.view(batch * beams, 1, dim)), 3, self.heads)
        own = self.own.index_select(1, origin).index_copy(3, step, torch.stack([k, v]))
        self.own.copy_(own)
        x = self.after_self_attention(x, self.attend(q, own[0], own[1], seen).view(x.shape))
        return self.feed_forward(self.cross_attend(x, self.memory[0], self.memory[1], memory_mask))


class TextEncoder(nn.Module):
    """Question to hidden states; the universal layers follow the text's own."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        own = config.text_encoder_layers - config.num_uni_layer
        self.layers = nn.ModuleList([Layer(config, cross_attention=False) for _ in range(own)])

    def forward(self, tokens: Tensor, mask: Tensor, universal: tuple[Layer, Layer]) -> Tensor:
        x = self.embeddings(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        for layer in (*self.layers, *universal):
            x = layer(x, None, mask)
        return x


class Fusion(nn.Module):
    """The question looks at the video; connected layers attend over both together."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [Layer(config, cross_attention=not config.connected(n)) for n in range(config.fusion_layers)]
        )

    def forward(self, text: Tensor, mask: Tensor, visual: Tensor, both_mask: Tensor) -> Tensor:
        """[visual; text] `(batch, S + tokens, D)`."""
        split = visual.shape[1]
        for layer in self.layers:
            if layer.has_cross:
                text = layer(text, visual, mask)
            else:
                both = layer(torch.cat([visual, text], dim=1), None, both_mask)
                visual, text = visual + both[:, :split], both[:, split:]
        return torch.cat([visual, text], dim=1)
