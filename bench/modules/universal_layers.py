"""Both universal layers as the model runs them for a video: visual tokens to image_embeds, normed."""

from __future__ import annotations

from torch import Tensor, nn

from bench import flops
from bench.modules.forms import Work, part_of
from bench.peer import Peer
from mplug2_fast import MPlug2Config
from mplug2_fast.models.mplug2 import MPlug2ForCaptioning
from mplug2_fast.ops import Explanation, attention, explain
from mplug2_fast.reference import MPlug2ForCaptioning as ReferenceForCaptioning


def shapes(config: MPlug2Config) -> list[tuple[int, ...]]:
    return [(1, flops.visual_tokens(config, config.vision.num_frames), config.text.hidden_size)]


def ours(model: nn.Module, visual: Tensor) -> Tensor:
    return model.visual_norm.add(visual, model.universal(visual))


def official(model: nn.Module, visual: Tensor) -> Tensor:
    return model.visn_emb_norm(visual + model.text_encoder.v_module(visual))


def of_peer(model: nn.Module, visual: Tensor) -> Tensor:
    return Peer(model).encode_universal(visual)


def flop(config: MPlug2Config, with_gradients: bool) -> int:
    text = config.text
    needed = flops.universal(config, config.vision.num_frames)
    if with_gradients:  # the latents' self-attention and queries are no constants then
        dim, latents = text.hidden_size, text.num_latents
        needed += 2 * latents * dim * 5 * dim + 4 * latents * latents * dim
    return needed


def main_operator(model: nn.Module, visual: Tensor) -> Explanation:
    heads = visual.unflatten(-1, (model.universal.layers[-1].attention.self.num_heads, -1))
    return explain(attention, heads, heads, heads)


PARTS = ("universal", "visual_norm")
WORK = Work(
    shapes,
    part_of(MPlug2ForCaptioning, lambda config: PARTS, ours, pack=True),
    part_of(ReferenceForCaptioning, lambda config: ["text_encoder", "visn_emb_norm"], official),
    part_of(MPlug2ForCaptioning, lambda config: PARTS, of_peer),
    flop,
    main_operator,
)
