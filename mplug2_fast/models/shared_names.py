"""The official names of modules that several families have, and where each one is in our modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from mplug2_fast.models.names import (
    CONTRAST,
    DECODER,
    FUSION,
    LAYER_NUMBER,
    MATCHING,
    Entry,
    KeyKind,
    OfficialNames,
    Shape,
)
from mplug2_fast.nn.config import BertConfig, StacksConfig

VISUAL = "visual_encoder.visual"
POSITIONS = f"{VISUAL}.positional_embedding"
DECODER_BERT = "text_decoder.bert"
PREDICTIONS = "text_decoder.cls.predictions"
TIED = {
    f"{PREDICTIONS}.decoder.weight": f"{DECODER_BERT}.embeddings.word_embeddings.weight",
    f"{PREDICTIONS}.decoder.bias": f"{PREDICTIONS}.bias",
}
"""Names that a file stores twice -> the name that the models use."""
WRAPPED_ENCODERS = {
    f"{encoder}.{wrapped}.": f"{encoder}."
    for encoder in ("text_encoder", "fusion_encoder", "text_encoder_m", "fusion_encoder_m")
    for wrapped in ("bert", "fusion")
}
"""In pre-training, each encoder is inside a module with a head."""
STORED_LAYER = re.compile(rf"(text_encoder|fusion_encoder|text_decoder\.bert)\.encoder\.layer\.{LAYER_NUMBER}\.(.+)")
"""A parameter of a BERT layer: its stack, its number, and its name inside the layer."""
STORED_EMBEDDINGS = re.compile(r"(text_encoder|fusion_encoder|text_decoder\.bert)\.embeddings\.(.+)")
CLIP_TEXT = re.compile(
    r"visual_encoder\.(positional_embedding|text_projection|logit_scale|token_embedding\.weight|ln_final\.(weight|bias)"
    r"|transformer\.resblocks\.[0-9]+\.(attn\.(in_proj_|out_proj\.)|ln_[12]\.|mlp\.c_(fc|proj)\.)(weight|bias))"
)
"""CLIP's text tower, which every official file has."""


def bert_layer(official: str, ours: str, text: BertConfig, *, cross: bool = True) -> Iterator[Entry]:
    """Our layer has BERT's names too, but for queries, keys and values, which are one parameter."""
    size, inner = text.hidden_size, text.intermediate_size
    for name in ("attention", "crossattention")[: 1 + cross]:
        for part, projection in enumerate(("query", "key", "value")):
            for kind, shape in (("weight", (size, size)), ("bias", (size,))):
                path = f"{ours}.{name}.self.in_proj_{kind}"
                yield Entry(f"{official}.{name}.self.{projection}.{kind}", shape, path, part, 3)
        yield from linear(f"{official}.{name}.output.dense", f"{ours}.{name}.output.dense", size, size)
        yield from norm(f"{official}.{name}.output.LayerNorm", f"{ours}.{name}.output.LayerNorm", size)
    yield from linear(f"{official}.intermediate.dense", f"{ours}.intermediate.dense", size, inner)
    yield from linear(f"{official}.output.dense", f"{ours}.output.dense", inner, size)
    yield from norm(f"{official}.output.LayerNorm", f"{ours}.output.LayerNorm", size)


def embeddings(official: str, ours: str, text: BertConfig) -> Iterator[Entry]:
    for name, own, rows in (
        ("word_embeddings", "word", text.vocab_size),
        ("position_embeddings", "position", text.max_position_embeddings),
        ("token_type_embeddings", "token_type", text.type_vocab_size),
    ):
        yield Entry(f"{official}.{name}.weight", (rows, text.hidden_size), f"{ours}.{own}.weight")
    yield from norm(f"{official}.LayerNorm", f"{ours}.norm", text.hidden_size)


def linear(official: str, ours: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield Entry(f"{official}.weight", (outputs, inputs), f"{ours}.weight")
    yield Entry(f"{official}.bias", (outputs,), f"{ours}.bias")


def norm(official: str, ours: str, size: int) -> Iterator[Entry]:
    yield Entry(f"{official}.weight", (size,), f"{ours}.weight")
    yield Entry(f"{official}.bias", (size,), f"{ours}.bias")


def clip_tower(vision: Any, patches: Shape) -> Iterator[Entry]:
    """CLIP's image tower with patch weights of shape `patches`. A block has CLIP's names in our modules too."""
    width, hidden = vision.width, vision.width * vision.mlp_ratio
    yield Entry(f"{VISUAL}.class_embedding", (width,), "visual.class_embedding")
    yield Entry(POSITIONS, (1 + vision.num_patches, width), "visual.positional_embedding")
    yield Entry(f"{VISUAL}.conv1.weight", patches, "visual.patch_weight")
    yield from norm(f"{VISUAL}.ln_pre", "visual.norm_pre", width)
    shapes = block_shapes(width, hidden)
    for i in range(vision.layers):
        for name, shape in shapes.items():
            yield Entry(f"{VISUAL}.transformer.resblocks.{i}.{name}", shape, f"visual.blocks.{i}.{name}")
    yield from norm(f"{VISUAL}.ln_post", "visual.norm_post", width)


def block_shapes(width: int, hidden: int) -> dict[str, Shape]:
    """The parameters of CLIP's block."""
    return {
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


def projection(vision: Any, text: StacksConfig) -> Iterator[Entry]:
    """From the width of the image tower to the text's, where they differ."""
    if vision.width != text.hidden_size:
        yield from linear("visn_fc", "visual_projection", vision.width, text.hidden_size)
        yield from norm("visn_layer_norm", "visual_projection_norm", text.hidden_size)


def after_encoders(config: Any, modules: frozenset[str]) -> Iterator[Entry]:
    """The modules that follow the encoders of images and texts."""
    if FUSION in modules:
        yield from fusion(config.text)
    if DECODER in modules:
        yield from decoder(config.text)
    if CONTRAST in modules:
        yield from contrast(config.text, config.contrast.embed_dim)
    if MATCHING in modules:  # the head that says whether a text matches
        yield from linear("itm_head", "matching", config.text.hidden_size, 2)


def decoder(text: StacksConfig) -> Iterator[Entry]:
    """The text decoder and its head."""
    yield from embeddings(f"{DECODER_BERT}.embeddings", "decoder.embeddings", text)
    for i in range(text.text_decode_layers):
        yield from bert_layer(f"{DECODER_BERT}.encoder.layer.{i}", f"decoder.layers.{i}", text)
    yield Entry(f"{PREDICTIONS}.bias", (text.vocab_size,), "decoder.head_bias")
    yield from linear(f"{PREDICTIONS}.transform.dense", "decoder.head", text.hidden_size, text.hidden_size)
    yield from norm(f"{PREDICTIONS}.transform.LayerNorm", "decoder.head_norm", text.hidden_size)


def fusion(text: StacksConfig) -> Iterator[Entry]:
    """The layers of the fusion encoder that run: the last ones that are stored."""
    for n in range(text.fusion_layers):
        official = f"fusion_encoder.encoder.layer.{text.stored_layers - text.fusion_layers + n}"
        yield from bert_layer(official, f"fusion.layers.{n}", text, cross=not text.connected(n))


def contrast(text: StacksConfig, embed_dim: int) -> Iterator[Entry]:
    """The projections of both sides, and the temperature."""
    for name in ("vision_proj", "text_proj"):
        yield from linear(name, f"contrast.{name}", text.hidden_size, embed_dim)
    yield Entry("temp", (), "contrast.temperature")


LAYER_KEYS = frozenset(e.official.removeprefix("x.") for e in bert_layer("x", "y", BertConfig(), cross=False))
"""Names inside a BERT layer without cross-attention."""
EMBEDDING_KEYS = frozenset(e.official.removeprefix("x.") for e in embeddings("x", "y", BertConfig()))
"""Names inside BERT's embeddings."""


class FamilyNames(OfficialNames):
    """The official names for one configuration of a family and a set of modules.

    Attributes:
        copied: the parts of which a file may also hold momentum copies. Names of copies end with `_m`.
    """

    resizable: ClassVar = frozenset({POSITIONS})
    tied: Mapping[str, str] = TIED
    copied: ClassVar[tuple[str, ...]]

    def __init__(
        self, entries: Callable[[Any, frozenset[str]], Iterator[Entry]], config: Any, modules: frozenset[str]
    ) -> None:
        super().__init__(entries(config, modules))
        self._modules = modules
        self._all = {entry.official for entry in entries(config, frozenset(config.modules))}

    def classify(self, key: str) -> KeyKind:
        known = super().classify(key)
        if known is not KeyKind.UNEXPECTED:
            return known
        part, _, name = key.partition("_m.")
        if part in self.copied:
            original = self.classify(f"{part}.{name}")
            return KeyKind.UNEXPECTED if original is KeyKind.UNEXPECTED else KeyKind.MOMENTUM
        if key in self._all or key == f"{VISUAL}.proj" or CLIP_TEXT.fullmatch(key) or self._is_stored_text(key):
            return KeyKind.UNUSED
        return KeyKind.UNEXPECTED

    def _is_stored_text(self, key: str) -> bool:
        """Whether an official file of this size stores `key` in one of its three BERT stacks."""
        embedding = STORED_EMBEDDINGS.fullmatch(key)
        if embedding:
            return embedding[2] == "position_ids" or embedding[2] in EMBEDDING_KEYS
        layer = STORED_LAYER.fullmatch(key)
        return layer is not None and self.is_stored(layer[1], int(layer[2]), layer[3])

    def is_stored(self, stack: str, layer: int, name: str) -> bool:
        """Whether an official file of this size stores `name` in a layer of a BERT stack."""
        raise NotImplementedError
