"""The compiled peer: mPLUG-2 captioning as an expert writes it in an afternoon for `torch.compile`.

Plain PyTorch, batch-first, scaled_dot_product_attention, fused projections, static caches, beams batched; nothing of
the fast model. What repeats is compiled as a region, so that one compilation serves all layers of a kind.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import peer_weights
from mplug2_fast.config import CLS_TOKEN_ID, SEP_TOKEN_ID, MPlug2Config, TextConfig, VisionConfig


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """`(batch, tokens, parts·D)` to `(parts, batch, heads, tokens, head_dim)`."""
    return x.view(*x.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class TemporalModule(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        inner, self.kernel = config.width // config.temporal_reduction, config.temporal_kernel_size
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.down = nn.Linear(config.width, inner)
        self.conv_weight = nn.Parameter(torch.empty(inner, self.kernel))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.up = nn.Linear(inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, frames, 1 + patches, D)`; shifted products, which the compiler fuses with the activation."""
        h = self.down(self.norm(x[:, :, 1:]))
        frames = h.shape[1]
        padded = F.pad(h, (0, 0, 0, 0, self.kernel // 2, self.kernel // 2))
        h = self.conv_bias + sum(
            padded[:, tap : tap + frames] * self.conv_weight[:, tap].contiguous() for tap in range(self.kernel)
        )
        h = self.up(h * torch.sigmoid(1.702 * h))
        return torch.cat([x[:, :, :1], x[:, :, 1:] + h], dim=2)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, eps = config.width, config.layer_norm_eps
        self.heads = config.num_heads
        self.temporal1, self.temporal2 = TemporalModule(config), TemporalModule(config)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, config.mlp_ratio * width), nn.Linear(config.mlp_ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.temporal1(x)
        q, k, v = split_heads(self.qkv(self.norm1(x)).flatten(0, 1), 3, self.heads)
        x = x + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v))).view(x.shape)
        x = self.temporal2(x)
        h = self.fc(self.norm2(x))
        return x + self.proj(h * torch.sigmoid(1.702 * h))


class Vision(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = 3 if config.temporal_downsampling else 1
        self.conv = nn.Conv3d(
            3,
            config.width,
            (kernel, config.patch_size, config.patch_size),
            stride=(config.temporal_stride if kernel == 3 else 1, config.patch_size, config.patch_size),
            padding=(kernel // 2, 0, 0),
            bias=False,
        )
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.positions = nn.Parameter(torch.empty(1 + config.num_patches, config.width))
        self.norm_pre = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.layers)])
        self.norm_post = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, video: Tensor) -> Tensor:
        x = self.conv(video).flatten(3).permute(0, 2, 3, 1)  # (batch, frames, patches, D)
        x = torch.cat([self.class_embedding.expand(*x.shape[:2], 1, -1), x], dim=2)
        x = self.norm_pre(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.norm_post(torch.cat([x[:, :, 0].mean(dim=1, keepdim=True), x[:, :, 1:].flatten(1, 2)], dim=1))


class Layer(nn.Module):
    """A post-norm BERT layer with cross-attention, over whole sequences or one cached token at a time."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        dim, self.heads = config.hidden_size, config.num_attention_heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.cross_q, self.cross_kv, self.cross_out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.fc, self.proj = nn.Linear(dim, config.intermediate_size), nn.Linear(config.intermediate_size, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=config.layer_norm_eps) for _ in range(3))

    def after_self_attention(self, x: Tensor, context: Tensor, key: Tensor, value: Tensor) -> Tensor:
        x = self.norm1(x + self.out(context))
        query = split_heads(self.cross_q(x), 1, self.heads)[0]
        x = self.norm2(x + self.cross_out(merge_heads(F.scaled_dot_product_attention(query, key, value))))
        return self.norm3(x + self.proj(F.gelu(self.fc(x))))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.heads)
        key, value = split_heads(self.cross_kv(memory), 2, self.heads)
        return self.after_self_attention(x, merge_heads(F.scaled_dot_product_attention(q, k, v)), key, value)

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

    def step(self, x: Tensor, step: Tensor, seen: Tensor, origin: Tensor) -> Tensor:
        """x `(batch, beams, D)` at position `step` `(1,)`; seen `(1, steps)`; origin: each row's row one step ago."""
        batch, beams, dim = x.shape
        q, k, v = split_heads(self.qkv(x.view(batch * beams, 1, dim)), 3, self.heads)
        own = self.own.index_select(1, origin).index_copy(3, step, torch.stack([k, v]))
        self.own.copy_(own)
        context = F.scaled_dot_product_attention(q, own[0], own[1], attn_mask=seen)
        return self.after_self_attention(x, merge_heads(context).view(x.shape), self.memory[0], self.memory[1])


class Decoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, dim)
        self.position = nn.Embedding(config.max_position_embeddings, dim)
        self.token_type = nn.Embedding(config.type_vocab_size, dim)
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.text_decode_layers)])
        self.head, self.head_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size))
        self.sizes: tuple[int, ...] = ()

    def start(self, memory: Tensor, beams: int, steps: int) -> None:
        sizes = (memory.shape[0], beams, steps, memory.shape[1])
        for layer in self.layers:
            if sizes != self.sizes:
                layer.allocate(*sizes)
            layer.remember(memory)
        self.sizes = sizes

    def embed(self, tokens: Tensor, step: Tensor) -> Tensor:
        return self.norm(self.word(tokens) + self.position(step) + self.token_type.weight[0])

    def best(self, x: Tensor, cumulative: Tensor, penalty: Tensor, end_bias: Tensor) -> tuple[Tensor, ...]:
        """The best beams among all continuations: scores, cumulative log-probabilities, origin, tokens."""
        x = self.head_norm(F.gelu(self.head(x)))
        log_probs = F.linear(x, self.word.weight, self.head_bias).float().log_softmax(dim=-1)
        log_probs[..., SEP_TOKEN_ID] += end_bias
        scores = (cumulative[:, :, None] + log_probs) / penalty
        scores, picks = scores.flatten(1).topk(x.shape[1], dim=-1)
        return scores, scores * penalty, picks // log_probs.shape[-1], picks % log_probs.shape[-1]

    def step(self, tokens: Tensor, step: Tensor, origin: Tensor, cumulative: Tensor, penalty: Tensor, end_bias: Tensor):
        x = self.embed(tokens, step)
        seen = torch.arange(self.sizes[2], device=tokens.device)[None] <= step
        for layer in self.layers:
            x = layer.step(x, step, seen, origin)
        return self.best(x, cumulative, penalty, end_bias)


class Peer(nn.Module):
    """Captioning. Parameters are uninitialised: write into `released_parameters()`."""

    def __init__(self, config: MPlug2Config, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        text, vision = config.text, config.vision
        self.config = config
        with torch.device("meta"):
            self.vision = Vision(vision)
            self.project = nn.Linear(vision.width, text.hidden_size) if vision.width != text.hidden_size else None
            self.project_norm = nn.LayerNorm(text.hidden_size, eps=1e-12) if self.project else None
            self.latents = nn.Parameter(torch.empty(text.num_latents, text.hidden_size))
            self.universal_first, self.universal_last = Layer(text), Layer(text)
            self.norm = nn.LayerNorm(text.hidden_size, eps=1e-12)
            self.decoder = Decoder(text)
        self.to(dtype).to_empty(device=device).eval().requires_grad_(False)

    def compile(self, backend: str = "inductor") -> None:  # type: ignore[override]
        """Compiles what repeats. On CUDA the decoding step becomes one CUDA graph."""
        static = {"dynamic": False, "fullgraph": True, "backend": backend}
        if next(self.parameters()).is_cuda:
            tuned = {**static, "mode": "max-autotune-no-cudagraphs"}
            self.decoder.step = torch.compile(self.decoder.step, mode="reduce-overhead", **static)
        else:
            tuned = static
            self.decoder.best = torch.compile(self.decoder.best, **static)
            for layer in self.decoder.layers:
                layer.step = torch.compile(layer.step, **static)
        for module in (*self.vision.blocks, self.universal_first, self.universal_last):
            module.forward = torch.compile(module.forward, **tuned)

    def encode_visual(self, video: Tensor) -> Tensor:
        x = self.vision(video.to(self.latents.dtype))
        return x if self.project is None else self.project_norm(self.project(x))

    def encode_universal(self, visual: Tensor) -> Tensor:
        latents = self.universal_first(self.latents.expand(visual.shape[0], -1, -1), visual)
        return self.norm(visual + self.universal_last(visual, latents))

    def encode_video(self, video: Tensor) -> Tensor:
        return self.encode_universal(self.encode_visual(video))

    @torch.no_grad()
    def decode(self, embeds: Tensor, beams: int, min_length: int, max_length: int) -> tuple[Tensor, Tensor]:
        """Best hypothesis of each video: ids `(batch, 1 + max_length)` padded with -1, and scores `(batch,)`."""
        batch, device = embeds.shape[0], embeds.device
        self.decoder.start(embeds, beams, max_length)
        sequences = torch.full((batch, beams, max_length + 1), -1, device=device)
        sequences[:, :, 0] = CLS_TOKEN_ID
        cumulative = torch.full((batch, beams), -torch.inf, device=device)
        cumulative[:, 0] = 0
        rows = torch.arange(batch, device=device)[:, None] * beams
        origin = (rows + torch.arange(beams, device=device)).flatten()
        steps = torch.arange(max_length, device=device)
        penalties = ((6.0 + steps) / 6.0) ** 0.6
        end_bias = torch.where(steps < min_length, -1e20, 0.0)
        done = torch.zeros(batch, dtype=torch.bool, device=device)
        best, best_scores = sequences[:, 0].clone(), torch.full((batch,), -torch.inf, device=device)
        for step in range(max_length):
            at = steps[step : step + 1]
            torch.compiler.cudagraph_mark_step_begin()
            scores, cumulative, parent, tokens = self.decoder.step(
                sequences[:, :, step], at, origin, cumulative, penalties[step], end_bias[step]
            )
            sequences = sequences.gather(1, parent[:, :, None].expand_as(sequences))
            sequences[:, :, step + 1] = tokens
            cumulative, origin = cumulative.clone(), (rows + parent).flatten()
            finished = tokens == SEP_TOKEN_ID
            now = finished[:, 0] if step + 1 < max_length else torch.ones_like(done)
            candidates = scores.masked_fill(~(finished | now[:, None]) | done[:, None], -torch.inf)
            score, beam = candidates.max(dim=1)
            better = score > best_scores
            best = torch.where(better[:, None], sequences[torch.arange(batch, device=device), beam], best)
            best_scores = torch.where(better, score, best_scores)
            done = done | now
            if step + 1 >= min_length and bool(done.all()):
                break
        return best, best_scores

    def released_parameters(self) -> dict[str, Tensor]:
        """Released key to a view into the parameters, for the keys that captioning uses."""
        return dict(peer_weights.released(self))
