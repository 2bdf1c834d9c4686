"""Both universal layers as the model runs them for a video: visual tokens to image_embeds, normed."""

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
from mplug2_fast.ops import Explanation, attention, explain
from mplug2_fast.reference import MPlug2ForCaptioning as ReferenceForCaptioning


class Ours(nn.Module):
    def __init__(self, model: MPlug2ForCaptioning) -> None:
        super().__init__()
        self.universal, self.norm = model.universal, model.visual_norm

    def forward(self, visual: Tensor) -> Tensor:
        return self.norm.add(visual, self.universal(visual))


class Released(nn.Module):
    def __init__(self, model: ReferenceForCaptioning) -> None:
        super().__init__()
        self.text_encoder, self.norm = model.text_encoder, model.visn_emb_norm

    def forward(self, visual: Tensor) -> Tensor:
        return self.norm(visual + self.text_encoder.v_module(visual))


class OfPeer(nn.Module):
    def __init__(self, model: Peer) -> None:
        super().__init__()
        self.model = model

    def forward(self, visual: Tensor) -> Tensor:
        return self.model.encode_universal(visual)


def shapes(config: MPlug2Config) -> list[tuple[int, ...]]:
    return [(1, flops.visual_tokens(config, config.vision.num_frames), config.text.hidden_size)]


def ours(config: MPlug2Config, device: str, dtype: torch.dtype) -> Form:
    model = MPlug2ForCaptioning(config, device="meta", dtype=dtype)
    weights = hold(model, device, "universal", "visual_norm")
    return Form(Ours(model.pack()), weights)


def reference(config: MPlug2Config, device: str, dtype: torch.dtype) -> Form:
    model = ReferenceForCaptioning(config, device="meta", dtype=dtype)
    weights = hold(model, device, "text_encoder", "visn_emb_norm")
    return Form(Released(model), weights)


def peer(config: MPlug2Config, device: str, dtype: torch.dtype) -> Form:
    model = Peer(config, device="meta", dtype=dtype)
    weights = hold(model, device, "latents", "universal_first", "universal_last", "norm")
    return Form(OfPeer(model), weights)


def flop(config: MPlug2Config, with_gradients: bool) -> int:
    text = config.text
    needed = flops.universal(config, config.vision.num_frames)
    if with_gradients:  # the latents' self-attention and queries are no constants then
        dim, latents = text.hidden_size, text.num_latents
        needed += 2 * latents * dim * 5 * dim + 4 * latents * latents * dim
    return needed


def main_operator(module: Ours, visual: Tensor) -> Explanation:
    heads = visual.unflatten(-1, (module.universal.last.attention.self.num_heads, -1))
    return explain(attention, heads, heads, heads)


WORK = Work(shapes, ours, reference, peer, flop, main_operator)


def build(key: Key, *, compile: bool) -> Case:
    return forms.build(WORK, key, compile=compile)
