"""The official names of all parameters of mPLUG, and where each one is in our modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

from mplug2_fast.models.mplug.config import MPlugConfig
from mplug2_fast.models.names import (
    CONTRAST,
    DECODER,
    FUSION,
    MATCHING,
    TEXT,
    VISION,
    Entry,
    KeyKind,
    OfficialNames,
)
from mplug2_fast.models.shared_names import (
    CLIP_TEXT,
    DECODER_BERT,
    EMBEDDING_KEYS,
    LAYER_KEYS,
    POSITIONS,
    STORED_EMBEDDINGS,
    STORED_LAYER,
    TIED,
    VISUAL,
    bert_layer,
    clip_tower,
    contrast,
    decoder,
    embeddings,
    fusion,
    linear,
    matching,
    norm,
)


def entries(config: MPlugConfig, modules: frozenset[str]) -> Iterator[Entry]:
    """Every parameter of the modules: official name, official shape, and our parameter."""
    vision, text = config.vision, config.text
    if VISION in modules:
        yield from clip_tower(vision, (vision.width, 3, vision.patch_size, vision.patch_size))
        if vision.width != text.hidden_size:
            yield from linear("visn_fc", "visual_projection", vision.width, text.hidden_size)
            yield from norm("visn_layer_norm", "visual_projection_norm", text.hidden_size)
    if TEXT in modules:
        yield from embeddings("text_encoder.embeddings", "text.embeddings", text)
        for i in range(text.text_encoder_layers):
            yield from bert_layer(f"text_encoder.encoder.layer.{i}", f"text.layers.{i}", text, cross=False)
    if FUSION in modules:
        yield from fusion(text)
    if DECODER in modules:
        yield from decoder(text)
    if CONTRAST in modules:
        yield from contrast(text, config.contrast.embed_dim)
    if MATCHING in modules:
        yield from matching(text)


_TWIN = re.compile(
    r"(visual_encoder|text_encoder|fusion_encoder|text_decoder|visn_fc|visn_layer_norm|vision_proj|text_proj)_m\."
)
_QUEUES = frozenset(("image_queue", "text_queue", "idx_queue", "queue_ptr"))
_BOX_BUFFERS = frozenset(("prefix_ids", "target_ids", "bbox_prob_mask"))
_PRETRAINING_HEAD = re.compile(r"(text_encoder|fusion_encoder)\.(cls|pooler)\..+")


class MPlugNames(OfficialNames):
    """The official names for one configuration of mPLUG and a set of modules."""

    resizable: ClassVar = frozenset({POSITIONS})
    tied: ClassVar = TIED

    def __init__(self, config: MPlugConfig, modules: frozenset[str]) -> None:
        super().__init__(entries(config, modules))
        text = config.text
        self._modules = modules
        self._all = {entry.official for entry in entries(config, frozenset(MPlugConfig.modules))}
        self._stored = {
            "text_encoder": text.text_encoder_layers,
            DECODER_BERT: text.text_decode_layers,
            "fusion_encoder": text.stored_layers,
        }

    def classify(self, key: str) -> KeyKind:
        known = super().classify(key)
        if known is not KeyKind.UNEXPECTED:
            return known
        twin = _TWIN.match(key)
        if twin:
            original = self.classify(f"{twin[1]}.{key[twin.end() :]}")
            return KeyKind.UNEXPECTED if original is KeyKind.UNEXPECTED else KeyKind.MOMENTUM
        if key in _QUEUES:
            return KeyKind.MOMENTUM
        if key in self._all or key in _BOX_BUFFERS or key == f"{VISUAL}.proj" or CLIP_TEXT.fullmatch(key):
            return KeyKind.UNUSED
        return KeyKind.UNUSED if self._is_stored_text(key) or _PRETRAINING_HEAD.fullmatch(key) else KeyKind.UNEXPECTED

    def _is_stored_text(self, key: str) -> bool:
        """Whether an official file of this size stores `key` in one of its three BERT stacks."""
        embedding = STORED_EMBEDDINGS.fullmatch(key)
        if embedding:
            return embedding[2] == "position_ids" or embedding[2] in EMBEDDING_KEYS
        layer = STORED_LAYER.fullmatch(key)
        if not layer:
            return False
        stack, index, name = layer[1], int(layer[2]), layer[3]
        needed = {"text_encoder": TEXT, "fusion_encoder": FUSION, DECODER_BERT: DECODER}[stack]
        # The size of a stack does not matter to a model without it.
        if needed in self._modules and index >= self._stored[stack]:
            return False
        return name in LAYER_KEYS or (stack != "text_encoder" and _cross(name) in LAYER_KEYS)


def _cross(name: str) -> str | None:
    return name.removeprefix("cross") if name.startswith("crossattention.") else None
