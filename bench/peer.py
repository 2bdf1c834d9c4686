"""The compiled peer: mPLUG-2 and mPLUG as an expert writes them in an afternoon for `torch.compile`.

It computes with the parameters of the fast model and none of its code: plain PyTorch, batch-first,
scaled_dot_product_attention, fused projections, static caches, all beams in one batch. Each function that repeats is
compiled once for all layers of its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.models.config import CLS_TOKEN_ID, PAD_TOKEN_ID, SEP_TOKEN_ID
from mplug2_fast.nn.vision_transformer import ImageEncoder
from mplug2_fast.tasks.grounding import BINS, FIRST_BIN, START

TUNED = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"}
"""What mode="max-autotune-no-cudagraphs" tunes on a GPU, without two searches that take minutes: Triton products, which
cuBLAS beat at all wide sizes of the Large model, and coordinate descent."""


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, or a convolution with a kernel of 1 over the last axis."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)


def dropout(layer: nn.Dropout, x: Tensor) -> Tensor:
    return F.dropout(x, layer.p, layer.training)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """`(batch, tokens, parts·D)` to `(parts, batch, heads, tokens, head_dim)`."""
    return x.view(*x.shape[:2], parts, heads, -1).permute(2, 0, 3, 1, 4)


def merge_heads(x: Tensor) -> Tensor:
    """`(batch, heads, tokens, head_dim)` to `(batch, tokens, D)`."""
    return x.transpose(1, 2).flatten(2)


def vision(model: nn.Module, video: Tensor, block: Callable[..., Tensor]) -> Tensor:
    """Video `(batch, 3, frames, height, width)` to tokens `(batch, 1 + frames·patches, width)`, or to those of images
    one after another `(batch, frames·(1 + patches), width)`."""
    config, patch = model.config, model.config.patch_size
    kernel, stride = (3, config.temporal_stride) if getattr(config, "temporal_downsampling", False) else (1, 1)
    weight = model.patch_weight.view(-1, 3, kernel, patch, patch)
    x = F.conv3d(video.to(weight.dtype), weight, stride=(stride, patch, patch), padding=(kernel // 2, 0, 0))
    x = x.flatten(3).permute(0, 2, 3, 1)  # (batch, frames, patches, width)
    x = torch.cat([model.class_embedding.expand(*x.shape[:2], 1, -1), x], dim=2)
    x = norm(model.norm_pre, x + model.positional_embedding)
    for layer in model.blocks:
        x = block(layer, x)
    if isinstance(model, ImageEncoder):
        return norm(model.norm_post, x.flatten(1, 2))
    return norm(model.norm_post, torch.cat([x[:, :, 0].mean(dim=1, keepdim=True), x[:, :, 1:].flatten(1, 2)], dim=1))


def vision_block(block: nn.Module, x: Tensor) -> Tensor:
    """`(batch, frames, 1 + patches, width)`."""
    x = x if block.lmhra1 is None else local_temporal(block.lmhra1, x)
    own = block.attn
    qkv = F.linear(norm(block.ln_1, x).flatten(0, 1), own.in_proj_weight, own.in_proj_bias)
    context = merge_heads(F.scaled_dot_product_attention(*split_heads(qkv, 3, own.num_heads)))
    x = x + linear(own.out_proj, context).view(x.shape)
    x = x if block.lmhra2 is None else local_temporal(block.lmhra2, x)
    return x + linear(block.mlp.c_proj, quick_gelu(linear(block.mlp.c_fc, norm(block.ln_2, x))))


def local_temporal(module: nn.Module, x: Tensor) -> Tensor:
    """The convolution is a sum of shifted products, which the compiler fuses with the activation."""
    h = linear(module.down_proj, norm(module.ln, x[:, :, 1:]))
    frames, taps = h.shape[1], module.conv.weight.flatten(1).unbind(1)
    padded = F.pad(h, (0, 0, 0, 0, len(taps) // 2, len(taps) // 2))
    h = module.conv.bias + sum(padded[:, i : i + frames] * tap.contiguous() for i, tap in enumerate(taps))
    h = linear(module.up_proj, quick_gelu(h))
    return torch.cat([x[:, :, :1], x[:, :, 1:] + h], dim=2)


def embed(embeddings: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    x = embeddings.word(tokens) + embeddings.position(positions) + embeddings.token_type.weight[0]
    return dropout(embeddings.dropout, norm(embeddings.norm, x))


def bert_layer(
    layer: nn.Module,
    x: Tensor,
    memory: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    memory_mask: Tensor | None = None,
) -> Tensor:
    """A post-norm BERT layer; with a memory, also cross-attention. Masks `(batch, 1, 1, tokens)`: tokens to see. A
    memory of batch 1 serves all sequences, as the queries of one."""
    own = layer.attention.self
    qkv = split_heads(F.linear(x, own.in_proj_weight, own.in_proj_bias), 3, own.num_heads)
    x = add_norm(layer.attention.output, x, attend(own, *qkv, mask, causal))
    if memory is not None:
        queries = x.reshape(memory.shape[0], -1, x.shape[-1])
        x = cross_attend(layer, queries, *memory_heads(layer, memory), memory_mask).view(x.shape)
    return feed_forward(layer, x)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False
) -> Tensor:
    rate = module.dropout.p if module.dropout.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate, is_causal=causal)
    return merge_heads(out)


def add_norm(output: nn.Module, x: Tensor, hidden: Tensor) -> Tensor:
    """The end of each part of a BERT layer: linear layer, dropout, residual, norm."""
    return norm(output.LayerNorm, x + dropout(output.dropout, linear(output.dense, hidden)))


def memory_heads(layer: nn.Module, memory: Tensor) -> Tensor:
    """Keys and values `(2, batch, heads, tokens, head_dim)` of a memory `(batch, tokens, D)`."""
    cross, dim = layer.crossattention.self, memory.shape[-1]
    return split_heads(F.linear(memory, cross.in_proj_weight[dim:], cross.in_proj_bias[dim:]), 2, cross.num_heads)


def cross_attend(layer: nn.Module, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    cross, dim = layer.crossattention.self, x.shape[-1]
    query = split_heads(F.linear(x, cross.in_proj_weight[:dim], cross.in_proj_bias[:dim]), 1, cross.num_heads)[0]
    return add_norm(layer.crossattention.output, x, attend(cross, query, key, value, mask))


def feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    return add_norm(layer.output, x, F.gelu(linear(layer.intermediate.dense, x)))


def cached_layer(
    layer: nn.Module,
    x: Tensor,
    cache: tuple[Tensor, Tensor],
    step: Tensor,
    seen: Tensor,
    origin: Tensor,
    memory_mask: Tensor | None,
) -> Tensor:
    """A decoder layer for the newest tokens alone.

    Args:
        x: `(batch, beams, D)`, at position `step` `(1,)`.
        cache: keys and values of the tokens so far `(2, batch·beams, heads, steps, head_dim)`, and of the memory.
        seen: `(1, steps)`. origin: the row in which each row was one step ago.
    """
    (batch, beams, dim), (past, memory), own = x.shape, cache, layer.attention.self
    qkv = F.linear(x.view(batch * beams, 1, dim), own.in_proj_weight, own.in_proj_bias)
    q, k, v = split_heads(qkv, 3, own.num_heads)
    present = past.index_select(1, origin).index_copy(3, step, torch.stack([k, v]))
    past.copy_(present)
    x = add_norm(layer.attention.output, x, attend(own, q, present[0], present[1], seen).view(x.shape))
    return feed_forward(layer, cross_attend(layer, x, memory[0], memory[1], memory_mask))


def logits(decoder: nn.Module, x: Tensor) -> Tensor:
    x = norm(decoder.head_norm, F.gelu(linear(decoder.head, x)))
    return F.linear(x, decoder.embeddings.word.weight, decoder.head_bias).float()


def token_loss(decoder: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy over the labels that are not -100."""
    return F.cross_entropy(logits(decoder, x).flatten(0, 1), labels.flatten())


def best_beams(
    decoder: nn.Module, x: Tensor, cumulative: Tensor, penalty: Tensor, end_bias: Tensor
) -> tuple[Tensor, ...]:
    """The best beams among all continuations: scores, cumulative log-probabilities, origin, tokens."""
    log_probs = logits(decoder, x).log_softmax(dim=-1)
    log_probs[..., SEP_TOKEN_ID] += end_bias
    scores = (cumulative[:, :, None] + log_probs) / penalty
    scores, picks = scores.flatten(1).topk(x.shape[1], dim=-1)
    return scores, scores * penalty, picks // log_probs.shape[-1], picks % log_probs.shape[-1]


class Peer:
    """The tasks with the parameters of `model`. Only those parts must have memory that run."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.sizes: tuple[Any, ...] = ()
        self.caches: list[tuple[Tensor, Tensor]] = []
        self.vision_block, self.bert_layer, self.cached_layer = vision_block, bert_layer, cached_layer
        self.best_beams, self.token_loss = best_beams, token_loss

    def compile(self, device: str = "cpu", backend: str = "inductor") -> None:
        """Compiles what repeats. On CUDA the whole decoding step becomes one CUDA graph."""
        static = {"dynamic": False, "fullgraph": True, "backend": backend}
        tuned = {**static, "options": TUNED} if device != "cpu" and backend == "inductor" else static
        if device != "cpu":
            self.step = torch.compile(self.step, mode="reduce-overhead", **static)  # type: ignore[method-assign]
        else:
            self.best_beams = torch.compile(best_beams, **static)
            self.cached_layer = torch.compile(cached_layer, **static)
        self.token_loss = torch.compile(token_loss, **tuned)
        self.vision_block = torch.compile(vision_block, **tuned)
        self.bert_layer = torch.compile(bert_layer, **tuned)

    def encode_visual(self, video: Tensor) -> Tensor:
        model = self.model
        x = vision(model.visual, video, self.vision_block)
        if model.visual_projection is None:
            return x
        return dropout(model.dropout, norm(model.visual_projection_norm, linear(model.visual_projection, x)))

    def encode_universal(self, visual: Tensor) -> Tensor:
        if not self.universal_layers:
            return visual
        model, universal = self.model, self.model.universal
        latents = self.bert_layer(universal.layers[0], universal.latents.expand(visual.shape[0], -1, -1), visual)
        update = self.bert_layer(universal.layers[-1], visual, latents)
        return dropout(model.dropout, norm(model.visual_norm, visual + update))

    @property
    def universal_layers(self) -> tuple[nn.Module, ...]:
        """mPLUG has none."""
        universal = getattr(self.model, "universal", None)
        return () if universal is None else tuple(universal.layers)

    def encode_video(self, video: Tensor) -> Tensor:
        return self.encode_universal(self.encode_visual(video))

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens and mask `(batch, tokens)` to `(batch, tokens, D)`."""
        text = embed(self.model.text.embeddings, tokens, torch.arange(tokens.shape[1], device=tokens.device))
        for layer in (*self.model.text.layers, *self.universal_layers):
            text = self.bert_layer(layer, text, None, mask[:, None, None].bool())
        return text

    def fuse(self, visual: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Visual and text after fusion, and the mask of both `(batch, 1, 1, S + tokens)`. A visual input of batch 1
        serves all texts, until a connected layer gives each its own."""
        mask, split = mask[:, None, None].bool(), visual.shape[1]
        both_mask = torch.cat([mask.new_ones(len(mask), 1, 1, split), mask], dim=-1)
        for layer in self.model.fusion.layers:
            if layer.crossattention is not None:
                text = self.bert_layer(layer, text, visual, mask)
            else:  # connected
                visual = visual.expand(len(text), -1, -1)
                both = self.bert_layer(layer, torch.cat([visual, text], dim=1), None, both_mask)
                visual, text = visual + both[:, :split], both[:, split:]
        return visual, text, both_mask

    def encode_question(self, video: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's memory [visual; text] `(batch, S + tokens, D)`, and its mask `(batch, 1, 1, S + tokens)`."""
        visual, text, both_mask = self.fuse(self.encode_video(video), self.encode_text(tokens, mask), mask)
        return torch.cat([visual, text], dim=1), both_mask

    def retrieval_features(self, video: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features of visual inputs and of texts, each `(batch, embed_dim)`."""
        contrast = self.model.contrast
        visual, text = self.encode_video(video)[:, 0], self.encode_text(tokens, mask)[:, 0]
        projected = linear(contrast.vision_proj, visual), linear(contrast.text_proj, text)
        return F.normalize(projected[0], dim=-1), F.normalize(projected[1], dim=-1)

    def match(self, visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The logits of each text `(texts, tokens, D)` with each visual input `(batch, S, D)`: `(batch, texts)`."""
        fused = [self.fuse(each[None], text, mask)[1][:, 0] for each in visual]
        return linear(self.model.matching, torch.stack(fused))[..., 1]

    def rank(self, memory: Tensor, memory_mask: Tensor, answers: Tensor) -> Tensor:
        """log p of each answer `(answers, tokens)` for each memory: `(batch, answers)`."""
        decoder, found = self.model.decoder, []
        for states, seen in zip(memory.split(1), memory_mask.split(1), strict=True):
            x = embed(decoder.embeddings, answers, torch.arange(answers.shape[1], device=answers.device))
            for layer in decoder.layers:
                x = self.bert_layer(layer, x, states, None, True, seen)
            labels = answers[:, 1:].masked_fill(answers[:, 1:] == PAD_TOKEN_ID, -100)
            losses = F.cross_entropy(logits(decoder, x[:, :-1]).flatten(0, 1), labels.flatten(), reduction="none")
            losses = losses.view(labels.shape)
            # The first token counts twice: it also chooses the candidates.
            found.append((-losses.sum(dim=1) - losses[:, 0]).log_softmax(dim=0))
        return torch.stack(found)

    def ground(self, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """Logits of the places in four greedy steps `(batch, 4, places)`."""
        batch, device = memory.shape[0], memory.device
        self.start(memory, 1, 4)
        token, origin, found = torch.full((batch, 1), START, device=device), torch.arange(batch, device=device), []
        for step in torch.arange(4, device=device):
            x = self.states(token, step[None], origin, memory_mask)
            found.append(logits(self.model.decoder, x)[:, 0, FIRST_BIN : FIRST_BIN + BINS])
            token = FIRST_BIN + found[-1].argmax(dim=-1, keepdim=True)
        return torch.stack(found, dim=1)

    def loss(self, video: Tensor, tokens: Tensor) -> Tensor:
        """The mean cross-entropy over the targets. All tokens of the prompt but the last are ignored.

        Padding comes last, so that no token before it sees it.
        """
        return self._mean_loss(self.encode_video(video), None, tokens, self.model.config.generation.prompt_tokens)[0]

    def answer_loss(self, video: Tensor, question: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """The summed cross-entropy of one answer to each question, over the number of questions."""
        mean, targets = self._mean_loss(*self.encode_question(video, question, mask), tokens, 0)
        return mean * targets / len(tokens)

    def _mean_loss(
        self, memory: Tensor, memory_mask: Tensor | None, tokens: Tensor, ignored: int
    ) -> tuple[Tensor, Tensor]:
        decoder = self.model.decoder
        x = embed(decoder.embeddings, tokens, torch.arange(tokens.shape[1], device=tokens.device))
        for layer in decoder.layers:
            x = self.bert_layer(layer, x, memory, None, True, memory_mask)
        labels = tokens[:, 1:].masked_fill(tokens[:, 1:] == PAD_TOKEN_ID, -100)
        labels[:, :ignored] = -100
        return self.token_loss(decoder, x[:, :-1], labels), (labels != -100).sum()

    def start(self, memory: Tensor, beams: int, steps: int) -> None:
        """Fills the static caches, which all videos of these sizes share."""
        layers, (batch, tokens, dim) = self.model.decoder.layers, memory.shape
        heads = layers[0].attention.self.num_heads
        if self.sizes != (batch, beams, steps, tokens):
            self.sizes = (batch, beams, steps, tokens)
            shapes = (2, batch * beams, heads, steps, dim // heads), (2, batch, heads, tokens, dim // heads)
            self.caches = [tuple(memory.new_zeros(shape) for shape in shapes) for _ in layers]
            if memory.is_cuda:  # a CUDA graph may then write to them
                for cache in self.caches:
                    for tensor in cache:
                        torch._dynamo.mark_static_address(tensor)
        for layer, (_, kept) in zip(layers, self.caches, strict=True):
            kept.copy_(memory_heads(layer, memory))

    def states(self, tokens: Tensor, step: Tensor, origin: Tensor, memory_mask: Tensor | None) -> Tensor:
        """Hidden states `(batch, beams, D)` of the newest tokens `(batch, beams)`."""
        decoder = self.model.decoder
        x = embed(decoder.embeddings, tokens, step)
        seen = torch.arange(self.sizes[2], device=tokens.device)[None] <= step
        for layer, cache in zip(decoder.layers, self.caches, strict=True):
            x = self.cached_layer(layer, x, cache, step, seen, origin, memory_mask)
        return x

    def step(
        self,
        tokens: Tensor,
        step: Tensor,
        origin: Tensor,
        memory_mask: Tensor | None,
        cumulative: Tensor,
        penalty: Tensor,
        end_bias: Tensor,
    ) -> tuple[Tensor, ...]:
        """As `best_beams`, from the newest tokens."""
        x = self.states(tokens, step, origin, memory_mask)
        return self.best_beams(self.model.decoder, x, cumulative, penalty, end_bias)

    @torch.no_grad()
    def decode(
        self, memory: Tensor, beams: int, min_length: int, max_length: int, memory_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The best hypothesis of each video: ids `(batch, 1 + max_length)`, padded with -1, and scores `(batch,)`."""
        batch, device = memory.shape[0], memory.device
        self.start(memory, beams, max_length)
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
            if device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            scores, cumulative, parent, tokens = self.step(
                sequences[:, :, step],
                steps[step : step + 1],
                origin,
                memory_mask,
                cumulative,
                penalties[step],
                end_bias[step],
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
