"""A layer of the fusion encoder: a question against the visual tokens."""

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
from bench.weights import fill
from mplug2_fast import MPlug2Config
from mplug2_fast.nn import FusionLayer
from mplug2_fast.ops import Explanation, attention, explain
from mplug2_fast.reference import MPlug2ForQuestionAnswering as ReferenceForQuestionAnswering
from mplug2_fast.reference.bert import BertLayer, cross_attention_mask, self_attention_mask

QUESTION_TOKENS = 16


def first(config: MPlug2Config) -> int:
    """The index in a checkpoint of the first layer that runs."""
    return config.text.stored_layers - config.text.fusion_layers


class Ours(nn.Module):
    """With a mask of the question, as the model calls it."""

    def __init__(self, layer: FusionLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        return self.layer(text, key_padding_mask=mask, memory=visual)


class Released(nn.Module):
    def __init__(self, layer: BertLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        text_mask, visual_mask = (torch.ones(x.shape[:2], dtype=torch.long, device=x.device) for x in (text, visual))
        memory_mask = cross_attention_mask(visual_mask, text.dtype)
        return self.layer(text, self_attention_mask(text_mask, text.dtype), visual, memory_mask)


def shapes(config: MPlug2Config) -> list[tuple[int, ...]]:
    dim = config.text.hidden_size
    return [(1, QUESTION_TOKENS, dim), (1, flops.visual_tokens(config, config.vision.num_frames), dim)]


def ours(config: MPlug2Config, device: str, dtype: torch.dtype) -> Form:
    layer = FusionLayer.from_config(config.text).to(device, dtype)
    name = f"fusion_encoder.encoder.layer.{first(config)}"
    weights = {f"{name}.{key}": parameter.detach() for key, parameter in layer.named_parameters()}
    fill(weights)
    return Form(Ours(layer), weights)


def reference(config: MPlug2Config, device: str, dtype: torch.dtype) -> Form:
    model = ReferenceForQuestionAnswering(config, device="meta", dtype=dtype)
    weights = hold(model, device, f"fusion_encoder.encoder.layer.{first(config)}")
    return Form(Released(model.fusion_encoder.encoder.layer[str(first(config))]), weights)


def peer(config: MPlug2Config, device: str, dtype: torch.dtype) -> Form:
    model = Peer(config, "question_answering", device="meta", dtype=dtype)
    weights = hold(model, device, "fusion.layers.0")
    return Form(model.fusion.layers[0], weights)


def flop(config: MPlug2Config, with_gradients: bool) -> int:
    return flops.fusion(config.replace(fusion_layers=1), config.vision.num_frames, QUESTION_TOKENS)


def main_operator(module: Ours, text: Tensor, visual: Tensor) -> Explanation:
    query, key = (x.unflatten(-1, (module.layer.attention.self.num_heads, -1)) for x in (text, visual))
    return explain(attention, query, key, key)


WORK = Work(shapes, ours, reference, peer, flop, main_operator)


def build(key: Key, *, compile: bool) -> Case:
    return forms.build(WORK, key, compile=compile)
