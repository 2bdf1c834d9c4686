"""A layer of the fusion encoder: a question attends to the visual tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench import flops, peer
from bench.modules.forms import Form, Work, part_of
from bench.weights import fill
from mplug2_fast import MPlug2Config
from mplug2_fast.models.mplug2 import MPlug2ForQuestionAnswering
from mplug2_fast.nn import FusionLayer
from mplug2_fast.ops import Explanation, attention, explain
from mplug2_fast.reference import MPlug2ForQuestionAnswering as ReferenceForQuestionAnswering
from mplug2_fast.reference.bert import cross_attention_mask, self_attention_mask

QUESTION_TOKENS = 16


def official_name(config: MPlug2Config) -> str:
    """The first layer that runs."""
    return f"fusion_encoder.encoder.layer.{config.text.stored_layers - config.text.fusion_layers}"


def seen(x: Tensor) -> Tensor:
    """A mask of all tokens."""
    return torch.ones(x.shape[:2], dtype=torch.long, device=x.device)


def shapes(config: MPlug2Config) -> list[tuple[int, ...]]:
    dim = config.text.hidden_size
    return [(1, QUESTION_TOKENS, dim), (1, flops.visual_tokens(config, config.vision.num_frames), dim)]


def ours(config: MPlug2Config, device: str, dtype: torch.dtype) -> Form:
    layer = FusionLayer.from_config(config.text).to(device, dtype)
    weights = {f"{official_name(config)}.{key}": parameter.detach() for key, parameter in layer.named_parameters()}
    fill(weights)
    return Form(layer, weights, lambda layer, text, visual: layer(text, key_padding_mask=seen(text), memory=visual))


def official(model: nn.Module, text: Tensor, visual: Tensor) -> Tensor:
    layer = model.get_submodule(official_name(model.config))
    memory_mask = cross_attention_mask(seen(visual), text.dtype)
    return layer(text, self_attention_mask(seen(text), text.dtype), visual, memory_mask)


def flop(config: MPlug2Config, with_gradients: bool) -> int:
    return flops.fusion(config.replace(fusion_layers=1), config.vision.num_frames, QUESTION_TOKENS)


def main_operator(layer: FusionLayer, text: Tensor, visual: Tensor) -> Explanation:
    query, key = (x.unflatten(-1, (layer.attention.self.num_heads, -1)) for x in (text, visual))
    return explain(attention, query, key, key)


WORK = Work(
    shapes,
    ours,
    part_of(ReferenceForQuestionAnswering, lambda config: [official_name(config)], official),
    part_of(
        MPlug2ForQuestionAnswering,
        lambda config: ["fusion.layers.0"],
        lambda model, text, visual: peer.bert_layer(model.fusion.layers[0], text, visual),
    ),
    flop,
    main_operator,
)
