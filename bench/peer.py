"""The compiled peer: mPLUG-2 as an expert writes it in an afternoon for `torch.compile`.

Plain PyTorch, batch-first, scaled_dot_product_attention, fused projections, static caches, beams batched; nothing of
the fast model. What repeats is compiled as a region, so that one compilation serves all layers of a kind.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench import peer_weights
from bench.peer_bert import Fusion, Layer, TextEncoder
from bench.peer_decoder import Decoder
from bench.peer_vision import Vision
from mplug2_fast.models.mplug2.config import CLS_TOKEN_ID, SEP_TOKEN_ID, MPlug2Config

# What mode="max-autotune-no-cudagraphs" tunes on a GPU, but for two searches that take minutes: products by Triton,
# where all of the wide ones of the Large model were found to be fastest by cuBLAS, and coordinate descent.
TUNED = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"}


class Peer(nn.Module):
    """Captioning, or question answering. Parameters are uninitialised: write into `official_parameters()`.

    It starts in inference mode, without gradients.
    """

    def __init__(
        self,
        config: MPlug2Config,
        task: str = "captioning",
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        text, vision = config.text, config.vision
        self.config, self.task = config, task
        with torch.device("meta"):
            self.vision = Vision(vision)
            self.project = nn.Linear(vision.width, text.hidden_size) if vision.width != text.hidden_size else None
            self.project_norm = nn.LayerNorm(text.hidden_size, eps=1e-12) if self.project else None
            self.latents = nn.Parameter(torch.empty(text.num_latents, text.hidden_size))
            self.universal_first, self.universal_last = Layer(text), Layer(text)
            self.norm = nn.LayerNorm(text.hidden_size, eps=1e-12)
            self.dropout = nn.Dropout(text.hidden_dropout_prob)
            self.text = TextEncoder(text) if task == "question_answering" else None
            self.fusion = Fusion(text) if task == "question_answering" else None
            self.decoder = Decoder(text)
        self.to(dtype).to_empty(device=device).eval().requires_grad_(False)

    def compile(self, backend: str = "inductor") -> None:  # type: ignore[override]
        """Compiles what repeats. On CUDA the decoding step becomes one CUDA graph."""
        static = {"dynamic": False, "fullgraph": True, "backend": backend}
        if next(self.parameters()).is_cuda:
            tuned = {**static, "options": TUNED} if backend == "inductor" else static
            self.decoder.step = torch.compile(self.decoder.step, mode="reduce-overhead", **static)
        else:
            tuned = static
            self.decoder.best = torch.compile(self.decoder.best, **static)
            for layer in self.decoder.layers:
                layer.step = torch.compile(layer.step, **static)
        self.decoder.token_loss = torch.compile(self.decoder.token_loss, **tuned)
        for module in self.modules():
            if isinstance(module, Layer) or module in set(self.vision.blocks):
                module.forward = torch.compile(module.forward, **tuned)

    def encode_visual(self, video: Tensor) -> Tensor:
        x = self.vision(video.to(self.latents.dtype))
        return x if self.project is None else self.dropout(self.project_norm(self.project(x)))

    def encode_universal(self, visual: Tensor) -> Tensor:
        latents = self.universal_first(self.latents.expand(visual.shape[0], -1, -1), visual)
        return self.dropout(self.norm(visual + self.universal_last(visual, latents)))

    def encode_video(self, video: Tensor) -> Tensor:
        return self.encode_universal(self.encode_visual(video))

    def encode_question(self, video: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's memory, [visual; text], and which of it is seen."""
        visual, mask = self.encode_video(video), mask[:, None, None].bool()
        both_mask = torch.cat([mask.new_ones(visual.shape[0], 1, 1, visual.shape[1]), mask], dim=-1)
        text = self.text(tokens, mask, (self.universal_first, self.universal_last))
        return self.fusion(text, mask, visual, both_mask), both_mask

    def loss(self, video: Tensor, tokens: Tensor) -> Tensor:
        """The mean cross-entropy over the targets. All tokens of the prompt but the last are ignored."""
        return self.decoder.loss(tokens, self.encode_video(video), self.config.generation.prompt_tokens)

    @torch.no_grad()
    def decode(
        self, memory: Tensor, beams: int, min_length: int, max_length: int, memory_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Best hypothesis of each video: ids `(batch, 1 + max_length)` padded with -1, and scores `(batch,)`."""
        batch, device = memory.shape[0], memory.device
        self.decoder.start(memory, beams, max_length)
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
            if device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            scores, cumulative, parent, tokens = self.decoder.step(
                sequences[:, :, step], at, origin, memory_mask, cumulative, penalties[step], end_bias[step]
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

    def official_parameters(self) -> dict[str, Tensor]:
        """Released key to a view into the parameters, for the keys that the task uses."""
        return self._released(Tensor.detach)

    def official_gradients(self) -> dict[str, Tensor]:
        """Released key to a view of the gradient. Every parameter must have one."""
        return self._released(lambda parameter: parameter.grad)

    def _released(self, get: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return dict(peer_weights.released(self, get))
