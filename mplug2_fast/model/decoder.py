"""The text decoder: whole sequences for training and ranking, single cached steps for generation.

The keys and values of the memory are computed once a video and shared by all sequences of that video, be they beams or
candidate answers: those stand side by side on an axis of their own, `(batch, sequences, tokens, channels)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mplug2_fast.config import TextConfig
from mplug2_fast.model.bert import BertEmbeddings, BertLayer
from mplug2_fast.nn import LayerNorm
from mplug2_fast.ops.attention import attention_with_dropout
from mplug2_fast.ops.beam_attention import beam_attention
from mplug2_fast.ops.decoder_layer import decoder_layer
from mplug2_fast.ops.gpu import early_kernels
from mplug2_fast.ops.linear_act import linear_act


@dataclass
class Memory:
    """What the decoder attends to.

    Attributes:
        keys, values: one a layer, `(batch, heads, tokens, head_dim)`. On a CPU they are contiguous; a GPU reads the
            heads of a token's projection where they lie, 128 bytes each, and is spared the copy.
        mask: `(batch, tokens)`, nonzero for tokens, or None where nothing is padding.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor | None

    def select(self, index: Tensor) -> Memory:
        """The memory of the videos `index`, one a row."""
        mask = None if self.mask is None else self.mask[index]
        return Memory([k[index] for k in self.keys], [v[index] for v in self.values], mask)


class SelfAttentionCache:
    """Keys and values of the tokens so far, which stay where they were written: what is reordered is the table of the
    rows in which they lie.

    Attributes:
        states: `(layers, 2, batch·beams, heads, max_length, head_dim)`.
        ancestors: `(batch·beams, max_length)`, int32, as `step_attention` has them.
    """

    def __init__(self, layers: int, rows: int, heads: int, max_length: int, head_dim: int, like: Tensor) -> None:
        self.states = like.new_empty(layers, 2, rows, heads, max_length, head_dim)
        own = torch.arange(rows, dtype=torch.int32, device=like.device)
        self.ancestors = own[:, None].repeat(1, max_length)

    def reorder(self, rows: Tensor, length: int) -> None:
        """Row i takes the first `length` steps of row `rows[i]`."""
        self.ancestors[:, :length] = self.ancestors[rows, :length]


class TextDecoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList([BertLayer(config, cross_attention=True) for _ in range(config.text_decode_layers)])
        self.head = nn.Linear(config.hidden_size, config.hidden_size)
        self.head_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size))

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states `(..., D)` to logits `(..., vocabulary)`; the output embeddings are the input's."""
        x = self.head_norm(linear_act(x, self.head.weight, self.head.bias, "gelu"))
        return linear_act(x, self.embeddings.word.weight, self.head_bias)

    def remember(self, memory: Tensor, mask: Tensor | None = None) -> Memory:
        """memory `(batch, tokens, D)` and its padding mask to the keys and values of every layer."""
        keys, values = [], []
        for layer in self.layers:
            key, value = (states.transpose(1, 2) for states in layer.cross.project_memory(memory))
            keys.append(key if memory.is_cuda else key.contiguous())
            values.append(value if memory.is_cuda else value.contiguous())
        return Memory(keys, values, mask)

    def _attend(self, layer: BertLayer, x: Tensor, memory: Memory, index: int) -> Tensor:
        """Cross-attention sub-layer for x `(batch, sequences, tokens, D)`."""
        cross = layer.cross
        query = cross.project_query(x.flatten(1, 2))
        key, value = memory.keys[index], memory.values[index]
        if self.training and cross.dropout.p > 0:
            context = attention_with_dropout(
                query, key.transpose(1, 2), value.transpose(1, 2), cross.dropout.p, key_padding_mask=memory.mask
            )
        else:
            context = beam_attention(query, key, value, key_padding_mask=memory.mask)
        return layer.add_norm(layer.cross_norm, x, lambda residual: cross.project_out(context.view(x.shape), residual))

    def forward(self, input_ids: Tensor, mask: Tensor, memory: Memory) -> Tensor:
        """Teacher forcing.

        Args:
            input_ids, mask: `(batch, sequences, tokens)`; all sequences of a row of the batch see the same memory.

        Returns hidden states `(batch, sequences, tokens, D)`.
        """
        x = self.embeddings(input_ids)
        for index, layer in enumerate(self.layers):
            x = layer.attend_self(x, key_padding_mask=mask, causal=True)
            x = self._attend(layer, x, memory, index)
            x = layer.feed_forward(x)
        return x

    def new_cache(self, batch: int, beams: int, max_length: int) -> SelfAttentionCache:
        config, like = self.config, self.embeddings.word.weight
        heads, head_dim = config.num_attention_heads, config.head_dim
        return SelfAttentionCache(len(self.layers), batch * beams, heads, max_length, head_dim, like)

    def step(self, tokens: Tensor, step: int, cache: SelfAttentionCache, memory: Memory) -> Tensor:
        """Logits `(batch, beams, vocabulary)` after the newest tokens `(batch, beams)`, those of position `step`.
        Nothing is dropped out.

        A norm is computed with the product after it, so that x is what goes into `norm`.
        """
        x, norm = self.embeddings.sums(tokens, start=step), self.embeddings.norm  # (batch, beams, D)
        with early_kernels(x):
            for index, layer in enumerate(self.layers):
                own, cross, mlp = layer.attention, layer.cross, layer.mlp
                x = decoder_layer(
                    x,
                    _pair(norm),
                    (own.in_proj_weight, own.in_proj_bias),
                    _pair(own.out_proj),
                    _pair(layer.attention_norm),
                    cross.query_parameters(),
                    _pair(cross.out_proj),
                    _pair(layer.cross_norm),
                    _pair(mlp.c_fc),
                    _pair(mlp.c_proj),
                    *cache.states[index],
                    cache.ancestors,
                    memory.keys[index],
                    memory.values[index],
                    step=step,
                    activation=mlp.activation,
                    key_padding_mask=memory.mask,
                    eps=norm.eps,
                )
                norm = layer.mlp_norm
            hidden, _ = norm.then(x, self.head.weight, self.head.bias, "gelu")
            logits, _ = self.head_norm.then(hidden, self.embeddings.word.weight, self.head_bias)
        return logits


def _pair(module: nn.Linear | LayerNorm) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias
