"""Files to captions. Ours decodes the next file while the model runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench import flops
from bench.case import OURS, Agreement, Call, Case
from bench.row import Key
from bench.video import decoding
from bench.video.files import BundledClips, Clips
from mplug2_fast import Captioner, MPlug2Config, load_released, ops
from mplug2_fast.outputs import GenerationOutput
from mplug2_fast.predict.predictor import TINY_MODEL
from mplug2_fast.reference import MPlug2ForCaptioning as ReferenceForCaptioning
from mplug2_fast.video import load_video

Load = Callable[..., Tensor]
Generate = Callable[[Tensor], GenerationOutput]
Texts = list[str | None]


def build(key: Key, clips: Clips | BundledClips) -> Case:
    """One call captions all files with the bundled model.

    Ours is `mplug2_fast.Captioner`. "reference" is the official algorithm in float32 with official decoding, one file
    after another. "eager" is our model without overlap. The error is 0 if captions agree, otherwise infinite.
    """
    captioner = Captioner(dtype=key.dtype, device=key.device)
    config, weights = captioner.model.config, next(captioner.model.parameters())
    sizes = {"num_frames": config.vision.num_frames, "image_size": config.vision.image_size}

    def overlapped() -> Texts:
        return [result.text for result in captioner.caption(clips.paths)]

    def generated(load: Load, generate: Generate) -> list[Tensor]:
        """The best sequence of each file."""
        return [generate(load(path, **sizes)[None]).sequences[0, 0] for path in clips.paths]

    def one_after_another(load: Load, generate: Generate) -> Texts:
        return [captioner.tokenizer.decode_caption(ids, config.generation.prompt) for ids in generated(load, generate)]

    def eager(video: Tensor) -> GenerationOutput:
        return captioner.model.generate(video.to(weights.device, weights.dtype))

    ways: dict[str, Callable[[], Callable[[], Texts]]] = {
        OURS: lambda: overlapped,
        "reference": lambda: partial(one_after_another, decoding.reference, official(config, key.device)),
        "eager": lambda: partial(one_after_another, load_video, eager),
    }

    def agreement() -> Agreement:
        texts = {way: prepare()() for way, prepare in ways.items()}
        errors = {way: 0.0 if found == texts["reference"] else math.inf for way, found in texts.items()}
        return Agreement(errors.pop(OURS), 0.0, errors)

    return Case(
        key,
        ways={way: lambda prepare=prepare: [Call(prepare())] for way, prepare in ways.items()},
        flop=sum(needed(config, len(ids) - 1) for ids in generated(load_video, eager)),
        bytes=0,
        agreement=agreement,
        backend=f"pyav, {ops.explain(ops.layer_norm, weights.new_zeros(1, 1)).chosen}",
    )


def needed(config: MPlug2Config, steps: int) -> int:
    """FLOP of a search that ends after `steps` tokens."""
    frames, beams = config.vision.num_frames, config.generation.num_beams
    return flops.needed("captioning", config, frames=frames, beams=beams, steps=steps)


def official(config: MPlug2Config, device: str) -> Generate:
    """The official model in float32 with the bundled weights."""
    model = ReferenceForCaptioning(config, device="meta", dtype=torch.float32).to_empty(device=device).eval()
    load_released(model, load_file(TINY_MODEL / "model.safetensors"))
    return lambda video: model.generate(video.to(device))
