"""The block of the vision encoder: local temporal module, attention within frames, local temporal module, MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench import flops
from bench.case import Case
from bench.held import hold
from bench.modules import forms
from bench.modules.forms import Form, Work
from bench.peer import Peer
from bench.row import DIRECTIONS as DIRECTIONS
from bench.row import Key
from mplug2_fast import MPlug2Config
from mplug2_fast.models.mplug2 import MPlug2ForCaptioning
from mplug2_fast.nn import TemporalBlock
from mplug2_fast.ops import Explanation, explain, local_temporal
from mplug2_fast.reference import MPlug2ForCaptioning as ReferenceForCaptioning


class Released(nn.Module):
    """The released block on its own layout `(1 + patches, frames, D)`, which the encoder keeps between blocks."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[0].transpose(0, 1), x.shape[1]).transpose(0, 1)[None]


def shapes(config: MPlug2Config) -> list[tuple[int, ...]]:
    vision = config.vision
    return [(1, vision.output_frames(vision.num_frames), 1 + vision.num_patches, vision.width)]


def ours(config: MPlug2Config, device: str, dtype: torch.dtype) -> Form:
    model = MPlug2ForCaptioning(config, device="meta", dtype=dtype)
    weights = hold(model, device, "visual.blocks.0")
    model.pack()
    return Form(model.visual.blocks[0], weights)


def reference(config: MPlug2Config, device: str, dtype: torch.dtype) -> Form:
    model = ReferenceForCaptioning(config, device="meta", dtype=dtype)
    weights = hold(model, device, "visual_encoder.visual.transformer.resblocks.0")
    return Form(Released(model.visual_encoder.visual.transformer.resblocks[0]), weights)


def peer(config: MPlug2Config, device: str, dtype: torch.dtype) -> Form:
    model = Peer(config, device="meta", dtype=dtype)
    weights = hold(model, device, "vision.blocks.0")
    return Form(model.vision.blocks[0], weights)


def flop(config: MPlug2Config, with_gradients: bool) -> int:
    parts = (flops.vision_projections, flops.vision_scores, flops.vision_mlp, flops.local_temporal)
    return sum(part(config, config.vision.num_frames) for part in parts) // config.vision.layers


def main_operator(block: TemporalBlock, x: Tensor) -> Explanation:
    temporal = block.lmhra1
    products = (temporal.down_proj, temporal.conv, temporal.up_proj)
    parameters = (parameter for layer in products for parameter in (layer.weight.flatten(1), layer.bias))
    return explain(local_temporal, x, temporal.ln.weight, temporal.ln.bias, *parameters)


WORK = Work(shapes, ours, reference, peer, flop, main_operator)


def build(key: Key, *, compile: bool) -> Case:
    return forms.build(WORK, key, compile=compile)
