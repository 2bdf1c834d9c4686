"""The official names of all parameters of mPLUG-2, and where each one is in our modules.

This is the only place that spells them. What a checkpoint must have and may have, and the views of a model's parameters
and gradients, follow from `entries`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import ClassVar

from mplug2_fast.models.mplug2.config import CLIP, FUSION_MLM, TEXT_MLM, UNIVERSAL, MPlug2Config
from mplug2_fast.models.names import FUSION, TEXT, VISION, Entry, KeyKind, Shape
from mplug2_fast.models.shared_names import (
    DECODER_BERT,
    LAYER_KEYS,
    TIED,
    VISUAL,
    FamilyNames,
    after_encoders,
    bert_layer,
    block_shapes,
    clip_tower,
    embeddings,
    linear,
    norm,
    projection,
)

UNSHARED = "universal_encoder.layer"
"""The stack of the video's universal layers where the text has its own."""


_WORD_HEADS = {
    TEXT_MLM: ("text_encoder.cls.predictions", "text_mlm"),
    FUSION_MLM: ("fusion_encoder.cls.predictions", "fusion_mlm"),
}
"""Module -> its official names, and ours."""


def entries(config: MPlug2Config, modules: frozenset[str]) -> Iterator[Entry]:
    """Every parameter of the modules: official name, official shape, and our parameter."""
    text = config.text
    first_universal = text.text_encoder_layers - text.num_uni_layer
    encoder_layer = "text_encoder.encoder.layer"
    if VISION in modules:
        yield from _vision(config)
        yield from projection(config.vision, text)
        yield from norm("visn_emb_norm", "visual_norm", text.hidden_size)
    if UNIVERSAL in modules and text.num_uni_layer:
        latents = (text.num_latents, text.hidden_size)
        # Layers that are not shared have no official names.
        stack, first = (encoder_layer, first_universal) if text.share_universal else (UNSHARED, 0)
        yield Entry(f"{stack}.{first}.latents", latents, "universal.latents")
        for i in range(text.num_uni_layer):
            yield from bert_layer(f"{stack}.{first + i}", f"universal.layers.{i}", text)
    if TEXT in modules:
        yield from embeddings("text_encoder.embeddings", "text.embeddings", text)
        for i in range(first_universal if text.share_universal else text.text_encoder_layers):
            yield from bert_layer(f"{encoder_layer}.{i}", f"text.layers.{i}", text, cross=False)
    yield from after_encoders(config, modules)
    if CLIP in modules:
        yield from _clip(config)
    for module, (root, ours) in _WORD_HEADS.items():
        if module in modules:
            yield Entry(f"{root}.bias", (text.vocab_size,), f"{ours}.bias")
            yield from linear(f"{root}.transform.dense", f"{ours}.dense", text.hidden_size, text.hidden_size)
            yield from norm(f"{root}.transform.LayerNorm", f"{ours}.norm", text.hidden_size)


@functools.cache
def official_name(path: str) -> str:
    """The first official name of one of our parameters, in a model of the default size."""
    every = entries(MPlug2Config(), frozenset(MPlug2Config.modules))
    return next(entry.official for entry in every if entry.path == path)


def stack_of(path: str) -> str:
    """The official name of the list of layers that our parameter is in, without the layer's number."""
    return re.sub(r"\.[0-9]+\..*", "", official_name(path))


def _clip(config: MPlug2Config) -> Iterator[Entry]:
    """CLIP's text tower, and its projection of images."""
    sizes, tower = config.clip, "visual_encoder"
    width = sizes.token_width
    yield Entry(f"{tower}.token_embedding.weight", (sizes.bpe_size, width), "clip.token_embedding.weight")
    yield Entry(f"{tower}.positional_embedding", (sizes.context_length, width), "clip.positional_embedding")
    for i in range(sizes.token_layers):
        for name, shape in block_shapes(width, 4 * width).items():
            yield Entry(f"{tower}.transformer.resblocks.{i}.{name}", shape, f"clip.blocks.{i}.{name}")
    yield from norm(f"{tower}.ln_final", "clip.norm_final", width)
    yield Entry(f"{tower}.text_projection", (width, sizes.joint_dim), "clip.text_projection")
    yield Entry(f"{VISUAL}.proj", (config.vision.width, sizes.joint_dim), "clip.visual_projection")
    yield Entry(f"{tower}.logit_scale", (), "clip.logit_scale")


def _vision(config: MPlug2Config) -> Iterator[Entry]:
    vision = config.vision
    width, inner = vision.width, vision.width // vision.temporal_reduction
    yield from clip_tower(
        vision, (width, 3, 3 if vision.temporal_downsampling else 1, vision.patch_size, vision.patch_size)
    )
    shapes: dict[str, Shape] = {
        "ln.weight": (width,),
        "ln.bias": (width,),
        "down_proj.weight": (inner, width, 1, 1, 1),
        "down_proj.bias": (inner,),
        "conv.weight": (inner, 1, vision.temporal_kernel_size, 1, 1),
        "conv.bias": (inner,),
        "up_proj.weight": (width, inner, 1, 1, 1),
        "up_proj.bias": (width,),
    }
    for i in range(vision.layers):
        for temporal in ("lmhra1", "lmhra2"):
            for name, shape in shapes.items():
                path = f"blocks.{i}.{temporal}.{name}"
                yield Entry(f"{VISUAL}.transformer.res{path}", shape, f"visual.{path}")


class MPlug2Names(FamilyNames):
    """The official names for one configuration of mPLUG-2 and a set of modules."""

    copied: ClassVar = (
        *("visual_encoder", "text_encoder", "fusion_encoder", "text_decoder"),
        *("visn_emb_norm", "visn_fc", "visn_layer_norm"),
    )

    def __init__(self, config: MPlug2Config, modules: frozenset[str]) -> None:
        super().__init__(entries, config, modules)
        text = config.text
        heads = [root for module, (root, _) in _WORD_HEADS.items() if module in modules]
        words = {f"{root}.decoder.weight": "text_encoder.embeddings.word_embeddings.weight" for root in heads}
        self.tied = TIED | words | {f"{root}.decoder.bias": f"{root}.bias" for root in heads}
        # Stored layers of each stack, and from which of them on the layers have unused vision parts.
        self._stacks = {
            "text_encoder": (text.text_encoder_layers, text.text_encoder_layers - text.num_uni_layer),
            DECODER_BERT: (text.text_decode_layers, text.text_decode_layers - text.num_uni_layer),
            "fusion_encoder": (text.stored_layers, text.stored_layers),
        }

    def classify(self, key: str) -> KeyKind:
        known = super().classify(key)
        if known is KeyKind.UNEXPECTED and any(key.startswith(f"{root}.decoder.") for root, _ in _WORD_HEADS.values()):
            return KeyKind.UNUSED
        return known

    def is_stored(self, stack: str, layer: int, name: str) -> bool:
        stored, first_universal = self._stacks[stack]
        # The size of the fusion encoder does not matter to a model without it.
        if layer >= stored and (stack != "fusion_encoder" or FUSION in self._modules):
            return False
        if name.startswith("crossattention."):
            known = stack != "text_encoder" or layer >= first_universal
            return known and name.removeprefix("cross") in LAYER_KEYS
        if name == "latents":
            return stack != "fusion_encoder" and layer == first_universal
        plain = re.sub(r"^(intermediate|output)_vision\.", r"\1.", name)
        return plain in LAYER_KEYS and (plain == name or (stack != "fusion_encoder" and layer >= first_universal))
