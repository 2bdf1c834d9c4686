"""The techniques between the official algorithm and the fast model, and the worker that runs one of them.

Parts of the reference and of the fast model are combined. Only weights that are used get memory.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import memory
from bench.implementations import NoInitialisation
from bench.plan import Spec
from bench.weights import allocate
from bench.worker import timed
from mplug2_fast import MPlug2Config, _native
from mplug2_fast._native import native
from mplug2_fast.models.mplug2 import MPlug2ForCaptioning
from mplug2_fast.nn.bert_layer import KeysValues
from mplug2_fast.nn.text_decoder import Memory, SelfAttentionCache, TextDecoder
from mplug2_fast.ops import use_backend
from mplug2_fast.outputs import GenerationOutput
from mplug2_fast.reference import MPlug2ForCaptioning as ReferenceForCaptioning

VISION = ("visual_encoder", "visn_fc", "visn_layer_norm")
UNIVERSAL = ("text_encoder", "visn_emb_norm")
FAST = ("visual", "visual_projection", "visual_projection_norm", "universal", "visual_norm", "decoder")

Caption = Callable[[Tensor], GenerationOutput]
"""From a video `(batch, 3, frames, height, width)`."""


@dataclass(frozen=True)
class Sizes:
    config: MPlug2Config
    dtype: torch.dtype
    device: str
    beams: int
    steps: int

    @property
    def generation(self) -> dict[str, int]:
        """min_length = max_length makes the end token impossible, so that each search takes all steps."""
        return {"num_beams": self.beams, "min_length": self.steps, "max_length": self.steps}

    def reference(self, *parts: str) -> ReferenceForCaptioning:
        with NoInitialisation():
            model = ReferenceForCaptioning(self.config, device="meta", dtype=self.dtype).eval()
        allocate(model, self.device, *parts)
        return model

    def fast(self, *parts: str) -> MPlug2ForCaptioning:
        model = MPlug2ForCaptioning(self.config, device="meta", dtype=self.dtype).eval()
        allocate(model, self.device, *parts)
        return model


def official(sizes: Sizes) -> Caption:
    model = sizes.reference(*VISION, *UNIVERSAL, "text_decoder")
    return lambda video: model.generate(video, **sizes.generation)


class CachedProjection(nn.Module):
    """Keys or values of a memory that is tiled over the beams: computed once, then copied for each beam."""

    def __init__(self, linear: nn.Linear, beams: int) -> None:
        super().__init__()
        self.linear, self.beams = linear, beams
        self.kept: Tensor | None = None

    def forward(self, tiled: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.linear(tiled[:: self.beams]).repeat_interleave(self.beams, dim=0)
        return self.kept


def projecting_once(sizes: Sizes) -> Caption:
    """The reference, whose decoder projects the video once instead of at each step. Each beam still has its copy."""
    model = sizes.reference(*VISION, *UNIVERSAL, "text_decoder")
    found = []
    for layer in model.text_decoder.bert.encoder.layer.values():
        attention = layer.crossattention.self
        attention.key, attention.value = (
            CachedProjection(part, sizes.beams) for part in (attention.key, attention.value)
        )
        found += [attention.key, attention.value]

    def caption(video: Tensor) -> GenerationOutput:
        for part in found:
            part.kept = None
        return model.generate(video, **sizes.generation)

    return caption


class TiledDecoder(TextDecoder):
    """Each beam has its copy of the memory's keys and values."""

    def step(self, tokens: Tensor, step: int, cache: SelfAttentionCache, memory: Memory) -> Tensor:
        batch, beams = tokens.shape
        if step == 0:
            tiled = [KeysValues(*(t.repeat_interleave(beams, dim=0) for t in each)) for each in memory.keys_values]
            memory.keys_values[:] = tiled
        return super().step(tokens.view(-1, 1), step, cache, memory).view(batch, beams, -1)


def caching(sizes: Sizes) -> Caption:
    """The fast decoder, which takes only the newest tokens. Beams are reordered by index."""
    encoder, model = sizes.reference(*VISION, *UNIVERSAL), sizes.fast("decoder")
    model.decoder.__class__ = TiledDecoder
    return with_torch(lambda video: model.generate(image_embeds=encoder.encode_video(video), **sizes.generation))


def sharing(sizes: Sizes) -> Caption:
    """The fast decoder unchanged: the queries of all beams share one memory."""
    encoder, model = sizes.reference(*VISION, *UNIVERSAL), sizes.fast("decoder")
    return with_torch(lambda video: model.generate(image_embeds=encoder.encode_video(video), **sizes.generation))


def universal(sizes: Sizes) -> Caption:
    """The fast universal layers behind the reference's vision encoder."""
    encoder, model = sizes.reference(*VISION), sizes.fast("universal", "visual_norm", "decoder")

    def caption(video: Tensor) -> GenerationOutput:
        visual = encoder.encode_visual(video)
        embeds = model.visual_norm.add(visual, model.universal(visual))
        return model.generate(image_embeds=embeds, **sizes.generation)

    return with_torch(caption)


def vision(sizes: Sizes) -> Caption:
    """The whole fast model, on PyTorch's operators."""
    return with_torch(kernels(sizes))


def products(sizes: Sizes) -> Caption:
    """Products by oneDNN, which needs no native module. Everything else stays PyTorch's."""
    sys.modules["mplug2_fast._C"] = None  # type: ignore[assignment]  # as if it were not installed
    _native._load.cache_clear()
    return kernels(sizes)


def kernels(sizes: Sizes) -> Caption:
    """The fast model with the backends that it chooses."""
    model = sizes.fast(*FAST)
    return lambda video: model.generate(video, **sizes.generation)


def packed(sizes: Sizes) -> Caption:
    """As in use: the vision encoder's weights are packed for the products."""
    model = sizes.fast(*FAST).pack()
    return lambda video: model.generate(video, **sizes.generation)


def with_torch(caption: Caption) -> Caption:
    """On PyTorch's operators only."""

    def run(video: Tensor) -> GenerationOutput:
        with use_backend("torch"):
            return caption(video)

    return run


ALGORITHM: dict[str, Callable[[Sizes], Caption]] = {
    "official algorithm": official,
    "keys and values of the video computed once": projecting_once,
    "one token per step, with cached keys and values": caching,
    "beams share the video's keys and values": sharing,
    "universal layers without a score matrix": universal,
    "vision encoder without permutations and copies": vision,
}
CPU: dict[str, Callable[[Sizes], Caption]] = {
    "oneDNN products with activation and residual inside": products,
    "own kernels": kernels,
    "packed weights": packed,
}
CUDA: dict[str, Callable[[Sizes], Caption]] = {"own Triton kernels": kernels}


def techniques(device: str) -> dict[str, Callable[[Sizes], Caption]]:
    """Each technique includes all those before it, in float32. Without the native module its kernels are skipped."""
    if device.startswith("cuda"):
        return ALGORITHM | CUDA
    return ALGORITHM | {name: make for name, make in CPU.items() if make is not kernels or native() is not None}


class StepWorker:
    """Captions the video of the exchange folder with the techniques up to `technique`."""

    def __init__(self, spec: Spec, technique: str) -> None:
        torch.set_num_threads(spec.threads)
        self.device, dtype = spec.device, getattr(torch, spec.dtype)
        sizes = Sizes(spec.config, dtype, spec.device, spec.beams, spec.steps)
        self.caption = techniques(spec.device)[technique](sizes)
        self.video = torch.load(Path(spec.exchange) / "video.pt").to(spec.device, dtype)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """One run: seconds, peak bytes of this process with weights, the best captions and their scores."""
        gc.collect()
        known = memory.reset_peak(self.device)
        seconds, out = timed(self.device, lambda: self.caption(self.video))
        return {
            "seconds": seconds,
            "peak_memory_bytes": memory.peak(self.device) if known else None,
            "captions": out.sequences[:, 0].tolist(),
            "scores": out.scores[:, 0].tolist(),
        }
