"""The block of the vision encoder: local temporal module, attention within frames, local temporal module, MLP."""

from __future__ import annotations

from torch import Tensor, nn

from bench import flops, peer
from bench.modules.forms import Work, part_of
from mplug2_fast import MPlug2Config
from mplug2_fast.models.mplug2 import MPlug2ForCaptioning
from mplug2_fast.ops import Explanation, explain, local_temporal
from mplug2_fast.reference import MPlug2ForCaptioning as ReferenceForCaptioning


def shapes(config: MPlug2Config) -> list[tuple[int, ...]]:
    vision = config.vision
    return [(1, vision.output_frames(vision.num_frames), 1 + vision.num_patches, vision.width)]


def official(model: nn.Module, x: Tensor) -> Tensor:
    """The official block keeps `(1 + patches, frames, D)` between blocks."""
    block = model.visual_encoder.visual.transformer.resblocks[0]
    return block(x[0].transpose(0, 1), x.shape[1]).transpose(0, 1)[None]


def flop(config: MPlug2Config, with_gradients: bool) -> int:
    parts = (flops.vision_projections, flops.vision_scores, flops.vision_mlp, flops.local_temporal)
    return sum(part(config, config.vision.num_frames) for part in parts) // config.vision.layers


def main_operator(model: nn.Module, x: Tensor) -> Explanation:
    temporal = model.visual.blocks[0].lmhra1
    products = (temporal.down_proj, temporal.conv, temporal.up_proj)
    parameters = (parameter for layer in products for parameter in (layer.weight.flatten(1), layer.bias))
    return explain(local_temporal, x, temporal.ln.weight, temporal.ln.bias, *parameters)


BLOCK = ("visual.blocks.0",)
WORK = Work(
    shapes,
    part_of(MPlug2ForCaptioning, lambda config: BLOCK, lambda model, x: model.visual.blocks[0](x), pack=True),
    part_of(ReferenceForCaptioning, lambda config: ["visual_encoder.visual.transformer.resblocks.0"], official),
    part_of(MPlug2ForCaptioning, lambda config: BLOCK, lambda model, x: peer.vision_block(model.visual.blocks[0], x)),
    flop,
    main_operator,
)
