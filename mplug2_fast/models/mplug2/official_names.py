"""The official names of all parameters of mPLUG-2, and where each one is in our modules.

This is the only place that spells them. What a checkpoint must have and may have, and the views of a model's parameters
and gradients, follow from `entries`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import ClassVar

from mplug2_fast.models.mplug2.config import MPlug2Config, TextConfig
from mplug2_fast.models.names import LAYER_NUMBER, Entry, KeyKind, OfficialNames

VISION, UNIVERSAL, TEXT, FUSION, DECODER = MODULES = ("vision", "universal", "text", "fusion", "decoder")

_VISUAL = "visual_encoder.visual"
_POSITIONS = f"{_VISUAL}.positional_embedding"
_DECODER_BERT = "text_decoder.bert"
_PREDICTIONS = "text_decoder.cls.predictions"


def entries(config: MPlug2Config, modules: frozenset[str]) -> Iterator[Entry]:
    """Every parameter of the modules: official name, official shape, and our parameter."""
    text = config.text
    first_universal = text.text_encoder_layers - text.num_uni_layer
    encoder_layer = "text_encoder.encoder.layer"
    if VISION in modules:
        yield from _vision(config)
        if config.vision.width != text.hidden_size:
            yield from _linear("visn_fc", "visual_projection", config.vision.width, text.hidden_size)
            yield from _norm("visn_layer_norm", "visual_projection_norm", text.hidden_size)
        yield from _norm("visn_emb_norm", "visual_norm", text.hidden_size)
    if UNIVERSAL in modules:
        latents = (text.num_latents, text.hidden_size)
        yield Entry(f"{encoder_layer}.{first_universal}.latents", latents, "universal.latents")
        for name, index in (("first", first_universal), ("last", first_universal + 1)):
            yield from _bert_layer(f"{encoder_layer}.{index}", f"universal.{name}", text)
    if TEXT in modules:
        yield from _embeddings("text_encoder.embeddings", "text.embeddings", text)
        for i in range(first_universal):
            yield from _bert_layer(f"{encoder_layer}.{i}", f"text.layers.{i}", text, cross=False)
    if FUSION in modules:
        for n in range(text.fusion_layers):
            official = f"fusion_encoder.encoder.layer.{text.stored_layers - text.fusion_layers + n}"
            yield from _bert_layer(official, f"fusion.layers.{n}", text, cross=not text.connected(n))
    if DECODER in modules:
        yield from _embeddings(f"{_DECODER_BERT}.embeddings", "decoder.embeddings", text)
        for i in range(text.text_decode_layers):
            yield from _bert_layer(f"{_DECODER_BERT}.encoder.layer.{i}", f"decoder.layers.{i}", text)
        yield Entry(f"{_PREDICTIONS}.bias", (text.vocab_size,), "decoder.head_bias")
        yield from _linear(f"{_PREDICTIONS}.transform.dense", "decoder.head", text.hidden_size, text.hidden_size)
        yield from _norm(f"{_PREDICTIONS}.transform.LayerNorm", "decoder.head_norm", text.hidden_size)


@functools.cache
def official_name(path: str) -> str:
    """The first official name of one of our parameters, in a model of the default size."""
    return next(entry.official for entry in entries(MPlug2Config(), frozenset(MODULES)) if entry.path == path)


def stack_of(path: str) -> str:
    """The official name of the list of layers that our parameter is in, without the layer's number."""
    return re.sub(r"\.[0-9]+\..*", "", official_name(path))


def _vision(config: MPlug2Config) -> Iterator[Entry]:
    vision = config.vision
    width, hidden, inner = vision.width, vision.width * vision.mlp_ratio, vision.width // vision.temporal_reduction
    frames = 3 if vision.temporal_downsampling else 1
    yield Entry(f"{_VISUAL}.class_embedding", (width,), "visual.class_embedding")
    yield Entry(_POSITIONS, (1 + vision.num_patches, width), "visual.positional_embedding")
    patches = (width, 3, frames, vision.patch_size, vision.patch_size)
    yield Entry(f"{_VISUAL}.conv1.weight", patches, "visual.patch_weight")
    yield from _norm(f"{_VISUAL}.ln_pre", "visual.norm_pre", width)
    for i in range(vision.layers):
        block, ours = f"{_VISUAL}.transformer.resblocks.{i}", f"visual.blocks.{i}"
        shapes: dict[str, tuple[int, ...]] = {}
        for temporal in ("lmhra1", "lmhra2"):
            shapes |= {
                f"{temporal}.ln.weight": (width,),
                f"{temporal}.ln.bias": (width,),
                f"{temporal}.down_proj.weight": (inner, width, 1, 1, 1),
                f"{temporal}.down_proj.bias": (inner,),
                f"{temporal}.conv.weight": (inner, 1, vision.temporal_kernel_size, 1, 1),
                f"{temporal}.conv.bias": (inner,),
                f"{temporal}.up_proj.weight": (width, inner, 1, 1, 1),
                f"{temporal}.up_proj.bias": (width,),
            }
        shapes |= {
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "mlp.c_fc.weight": (hidden, width),
            "mlp.c_fc.bias": (hidden,),
            "mlp.c_proj.weight": (width, hidden),
            "mlp.c_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
        }
        for name, shape in shapes.items():  # a block has CLIP's names in our modules too
            yield Entry(f"{block}.{name}", shape, f"{ours}.{name}")
    yield from _norm(f"{_VISUAL}.ln_post", "visual.norm_post", width)


def _bert_layer(official: str, ours: str, text: TextConfig, *, cross: bool = True) -> Iterator[Entry]:
    """Our layer has BERT's names too, but for queries, keys and values, which are one parameter."""
    size, inner = text.hidden_size, text.intermediate_size
    for name in ("attention", "crossattention")[: 1 + cross]:
        for part, projection in enumerate(("query", "key", "value")):
            for kind, shape in (("weight", (size, size)), ("bias", (size,))):
                path = f"{ours}.{name}.self.in_proj_{kind}"
                yield Entry(f"{official}.{name}.self.{projection}.{kind}", shape, path, part, 3)
        yield from _linear(f"{official}.{name}.output.dense", f"{ours}.{name}.output.dense", size, size)
        yield from _norm(f"{official}.{name}.output.LayerNorm", f"{ours}.{name}.output.LayerNorm", size)
    yield from _linear(f"{official}.intermediate.dense", f"{ours}.intermediate.dense", size, inner)
    yield from _linear(f"{official}.output.dense", f"{ours}.output.dense", inner, size)
    yield from _norm(f"{official}.output.LayerNorm", f"{ours}.output.LayerNorm", size)


def _embeddings(official: str, ours: str, text: TextConfig) -> Iterator[Entry]:
    for name, own, rows in (
        ("word_embeddings", "word", text.vocab_size),
        ("position_embeddings", "position", text.max_position_embeddings),
        ("token_type_embeddings", "token_type", text.type_vocab_size),
    ):
        yield Entry(f"{official}.{name}.weight", (rows, text.hidden_size), f"{ours}.{own}.weight")
    yield from _norm(f"{official}.LayerNorm", f"{ours}.norm", text.hidden_size)


def _linear(official: str, ours: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield Entry(f"{official}.weight", (outputs, inputs), f"{ours}.weight")
    yield Entry(f"{official}.bias", (outputs,), f"{ours}.bias")


def _norm(official: str, ours: str, size: int) -> Iterator[Entry]:
    yield Entry(f"{official}.weight", (size,), f"{ours}.weight")
    yield Entry(f"{official}.bias", (size,), f"{ours}.bias")


_MOMENTUM = re.compile(
    r"(visual_encoder|text_encoder|fusion_encoder|text_decoder|visn_emb_norm|visn_fc|visn_layer_norm)_m\."
)
_CLIP_TEXT = re.compile(
    r"visual_encoder\.(positional_embedding|text_projection|logit_scale|token_embedding\.weight|ln_final\.(weight|bias)"
    r"|transformer\.resblocks\.[0-9]+\.(attn\.(in_proj_|out_proj\.)|ln_[12]\.|mlp\.c_(fc|proj)\.)(weight|bias))"
)
_LAYER = re.compile(rf"(text_encoder|fusion_encoder|text_decoder\.bert)\.encoder\.layer\.{LAYER_NUMBER}\.(.+)")
_EMBEDDINGS = re.compile(r"(text_encoder|fusion_encoder|text_decoder\.bert)\.embeddings\.(.+)")
_LAYER_KEYS = frozenset(e.official.removeprefix("x.") for e in _bert_layer("x", "y", TextConfig(), cross=False))
_EMBEDDING_KEYS = frozenset(e.official.removeprefix("x.") for e in _embeddings("x", "y", TextConfig()))


class MPlug2Names(OfficialNames):
    """The official names for one configuration of mPLUG-2 and a set of modules."""

    resizable: ClassVar = frozenset({_POSITIONS})
    tied: ClassVar = {
        f"{_PREDICTIONS}.decoder.weight": f"{_DECODER_BERT}.embeddings.word_embeddings.weight",
        f"{_PREDICTIONS}.decoder.bias": f"{_PREDICTIONS}.bias",
    }

    def __init__(self, config: MPlug2Config, modules: frozenset[str]) -> None:
        super().__init__(entries(config, modules))
        text = config.text
        self._modules = modules
        self._all = {entry.official for entry in entries(config, frozenset(MODULES))}
        # Stored layers of each stack, and from which of them on the layers have unused vision parts.
        self._stacks = {
            "text_encoder": (text.text_encoder_layers, text.text_encoder_layers - text.num_uni_layer),
            _DECODER_BERT: (text.text_decode_layers, text.text_decode_layers - text.num_uni_layer),
            "fusion_encoder": (text.stored_layers, text.stored_layers),
        }

    def classify(self, key: str) -> KeyKind:
        known = super().classify(key)
        if known is not KeyKind.UNEXPECTED:
            return known
        momentum = _MOMENTUM.match(key)
        if momentum:
            original = self.classify(f"{momentum[1]}.{key[momentum.end() :]}")
            return KeyKind.UNEXPECTED if original is KeyKind.UNEXPECTED else KeyKind.MOMENTUM
        if key in self._all or key == f"{_VISUAL}.proj" or _CLIP_TEXT.fullmatch(key) or self._is_stored_text(key):
            return KeyKind.UNUSED
        return KeyKind.UNEXPECTED

    def _is_stored_text(self, key: str) -> bool:
        """Whether an official file of this size stores `key` in one of its three BERT stacks."""
        embedding = _EMBEDDINGS.fullmatch(key)
        if embedding:
            return embedding[2] == "position_ids" or embedding[2] in _EMBEDDING_KEYS
        layer = _LAYER.fullmatch(key)
        if not layer:
            return False
        stack, index, name = layer[1], int(layer[2]), layer[3]
        stored, first_universal = self._stacks[stack]
        if stack == "fusion_encoder" and FUSION not in self._modules:
            stored = index + 1  # its size does not matter to a model without fusion
        if index >= stored:
            return False
        if name.startswith("crossattention."):
            known = stack != "text_encoder" or index >= first_universal
            return known and name.removeprefix("cross") in _LAYER_KEYS
        if name == "latents":
            return stack != "fusion_encoder" and index == first_universal
        plain = re.sub(r"^(intermediate|output)_vision\.", r"\1.", name)
        return plain in _LAYER_KEYS and (plain == name or (stack != "fusion_encoder" and index >= first_universal))
