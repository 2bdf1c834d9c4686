"""The official names of all parameters of mPLUG, and where each one is in our modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

from mplug2_fast.models.mplug.config import MPlugConfig
from mplug2_fast.models.names import DECODER, FUSION, TEXT, VISION, Entry, KeyKind
from mplug2_fast.models.shared_names import (
    DECODER_BERT,
    LAYER_KEYS,
    FamilyNames,
    after_encoders,
    bert_layer,
    clip_tower,
    embeddings,
    projection,
)


def entries(config: MPlugConfig, modules: frozenset[str]) -> Iterator[Entry]:
    """Every parameter of the modules: official name, official shape, and our parameter."""
    vision, text = config.vision, config.text
    if VISION in modules:
        yield from clip_tower(vision, (vision.width, 3, vision.patch_size, vision.patch_size))
        yield from projection(vision, text)
    if TEXT in modules:
        yield from embeddings("text_encoder.embeddings", "text.embeddings", text)
        for i in range(text.text_encoder_layers):
            yield from bert_layer(f"text_encoder.encoder.layer.{i}", f"text.layers.{i}", text, cross=False)
    yield from after_encoders(config, modules)


_QUEUES = frozenset(("image_queue", "text_queue", "idx_queue", "queue_ptr"))
_BOX_BUFFERS = frozenset(("prefix_ids", "target_ids", "bbox_prob_mask"))
_PRETRAINING_HEAD = re.compile(r"(text_encoder|fusion_encoder)\.(cls|pooler)\..+")


class MPlugNames(FamilyNames):
    """The official names for one configuration of mPLUG and a set of modules."""

    copied: ClassVar = (
        *("visual_encoder", "text_encoder", "fusion_encoder", "text_decoder"),
        *("visn_fc", "visn_layer_norm", "vision_proj", "text_proj"),
    )

    def __init__(self, config: MPlugConfig, modules: frozenset[str]) -> None:
        super().__init__(entries, config, modules)
        text = config.text
        self._stored = {
            "text_encoder": (TEXT, text.text_encoder_layers),
            DECODER_BERT: (DECODER, text.text_decode_layers),
            "fusion_encoder": (FUSION, text.stored_layers),
        }

    def classify(self, key: str) -> KeyKind:
        if key in _QUEUES:
            return KeyKind.MOMENTUM
        if key in _BOX_BUFFERS or _PRETRAINING_HEAD.fullmatch(key):
            return KeyKind.UNUSED
        return super().classify(key)

    def is_stored(self, stack: str, layer: int, name: str) -> bool:
        module, count = self._stored[stack]
        # The size of a stack does not matter to a model without it.
        if module in self._modules and layer >= count:
            return False
        crossed = name.startswith("crossattention.") and stack != "text_encoder"
        return (name.removeprefix("cross") if crossed else name) in LAYER_KEYS
