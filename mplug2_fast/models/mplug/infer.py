"""The sizes of an mPLUG model, read from the shapes of its official state dict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mplug2_fast.errors import CheckpointError, ConfigError
from mplug2_fast.models.family import InferredConfig
from mplug2_fast.models.mplug.config import MPlugConfig
from mplug2_fast.models.mplug.official_names import MPlugNames
from mplug2_fast.models.names import CONTRAST, DECODER, FUSION, LAYER_NUMBER, MATCHING, TEXT, VISION, Shape
from mplug2_fast.models.shared_names import DECODER_BERT, POSITIONS, VISUAL

_HEAD_DIM = 64
_PATCHES, _MLP = f"{VISUAL}.conv1.weight", f"{VISUAL}.transformer.resblocks.0.mlp.c_fc.weight"
_BLOCKS = f"{VISUAL}.transformer.resblocks"
_TEXT, _FUSION, _DECODER = (f"{part}.encoder.layer" for part in ("text_encoder", "fusion_encoder", DECODER_BERT))
_STRIDES = {768: 3, 1024: 6}
"""Width of the image tower -> the official stride_layer."""
_FUSION_LAYERS = 6


def recognise(shapes: Mapping[str, Shape]) -> int:
    """How many of the parameters of an mPLUG model a state dict has. Zero if it has parts of mPLUG-2."""
    if any(".lmhra1." in key or key.startswith("visn_emb_norm.") for key in shapes):
        return 0
    needed = MPlugNames(MPlugConfig(), frozenset(MPlugConfig.modules)).needed
    return len(needed.keys() & shapes.keys()) + (len(shapes.get(_PATCHES, ())) == 4)


def infer(shapes: Mapping[str, Shape], stated: Mapping[str, Any]) -> InferredConfig:
    """See `mplug2_fast.models.infer_config`."""
    modules = _modules(shapes)
    _require({_PATCHES: 4, POSITIONS: 2, _MLP: 2}, shapes)
    if not modules & {TEXT, DECODER}:
        raise CheckpointError(
            "it has neither a text encoder nor a text decoder\n"
            "  remedy: use a whole checkpoint of mPLUG, with its official key names"
        )
    assumed: dict[str, Any] = {}
    undetermined: dict[str, str] = {}

    def told(part: str, name: str, default: Any, source: str | None = None) -> Any:
        value = stated.get(source or name)
        if value is None:
            assumed[f"{part}.{name}"] = value = default
        elif type(value) is not type(default):
            kind = type(value).__name__
            raise CheckpointError(
                f"its own configuration states {source or name} as {kind}: correct it, or pass config="
            )
        return value

    vision, text = _vision_sizes(shapes), _text_sizes(shapes, modules)
    vision["num_frames"] = told("vision", "num_frames", MPlugConfig().vision.num_frames, "num_frm_test")
    text["num_attention_heads"] = told("text", "num_attention_heads", max(1, text["hidden_size"] // _HEAD_DIM))
    if FUSION in modules:
        stored = _layers(shapes, _FUSION)
        whole = any(key.startswith("fusion_encoder.embeddings.") for key in shapes) or min(stored) == 0
        if not whole:  # what never runs is gone already
            text["fusion_layers"] = len(stored)
        else:
            text["fusion_layers"] = min(told("text", "fusion_layers", _FUSION_LAYERS), text["stored_layers"])
        stride = _first_connected(shapes, text["stored_layers"] - text["fusion_layers"])
        if stride is None and vision["width"] not in _STRIDES and stated.get("stride_layer") is None:
            undetermined["text.stride_layer"] = FUSION
        else:
            text["stride_layer"] = stride or told("text", "stride_layer", _STRIDES.get(vision["width"], 6))
    generation = {
        "num_beams": told("generation", "num_beams", 5, "beam_size"),
        "prompt": told("generation", "prompt", ""),
    }
    generation |= {name: stated[name] for name in ("min_length", "max_length") if stated.get(name) is not None}
    contrast = {"embed_dim": shapes["vision_proj.weight"][0]} if CONTRAST in modules else {}
    try:
        config = MPlugConfig().replace(vision=vision, text=text, generation=generation, contrast=contrast)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"the shapes of the checkpoint make no model: {error}") from error
    return InferredConfig(config, modules, assumed, undetermined)


def _modules(shapes: Mapping[str, Shape]) -> frozenset[str]:
    """The modules whose first parts are there."""
    found = {VISION}
    if _layers(shapes, _TEXT) and any(key.startswith("text_encoder.embeddings.") for key in shapes):
        found.add(TEXT)
    if _layers(shapes, _FUSION):
        found.add(FUSION)
    if _layers(shapes, _DECODER):
        found.add(DECODER)
    if len(shapes.get("vision_proj.weight", ())) == 2 and "text_proj.weight" in shapes:
        found.add(CONTRAST)
    if any(key.startswith("itm_head.") for key in shapes):
        found.add(MATCHING)
    return frozenset(found)


def _require(anchors: Mapping[str, int], shapes: Mapping[str, Shape]) -> None:
    absent = [key for key in anchors if key not in shapes]
    if absent:
        listing = "".join(f"\n  {key}" for key in absent)
        raise CheckpointError(
            f"keys that determine the model's sizes are missing:{listing}\n"
            "  remedy: use a whole checkpoint of mPLUG, with its official key names"
        )
    flat = [
        f"{key} {list(shapes[key])}" for key, rank in anchors.items() if len(shapes[key]) != rank or 0 in shapes[key]
    ]
    if flat:
        raise CheckpointError(f"shapes that no mPLUG model has: {', '.join(flat)}")


def _vision_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    width, _, patch, _ = shapes[_PATCHES]
    tokens = shapes[POSITIONS][0]
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1 or not side:
        raise CheckpointError(
            f"{POSITIONS} has {tokens} rows, which is not a class token and a square of patches: "
            "the checkpoint was trained on another kind of input"
        )
    return {
        "width": width,
        "layers": _count(_layers(shapes, _BLOCKS)),
        "patch_size": patch,
        "image_size": side * patch,
        "head_dim": _HEAD_DIM,
        "mlp_ratio": max(1, shapes[_MLP][0] // width),
    }


def _text_sizes(shapes: Mapping[str, Shape], modules: frozenset[str]) -> dict[str, Any]:
    """From the decoder, or from the text encoder of a file without one."""
    root = DECODER_BERT if DECODER in modules else "text_encoder"
    words, positions, types = (
        f"{root}.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")
    )
    inner = f"{root}.encoder.layer.0.intermediate.dense.weight"
    _require(dict.fromkeys((words, positions, types, inner), 2), shapes)
    vocabulary, hidden = shapes[words]
    defaults = MPlugConfig().text
    stored = _count(_layers(shapes, _FUSION))
    return {
        "hidden_size": hidden,
        "intermediate_size": shapes[inner][0],
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes[positions][0],
        "type_vocab_size": shapes[types][0],
        "text_encoder_layers": _count(_layers(shapes, _TEXT)) or defaults.text_encoder_layers,
        "text_decode_layers": _count(_layers(shapes, _DECODER)) or defaults.text_decode_layers,
        "stored_layers": stored or defaults.stored_layers,
        "fusion_layers": min(_FUSION_LAYERS, stored or defaults.stored_layers),
    }


def _first_connected(shapes: Iterable[str], first_layer: int) -> int | None:
    """Which of the fusion layers that run is the first without cross-attention, where those were left out."""
    crossing = _layers((key for key in shapes if ".crossattention." in key), _FUSION)
    stored = sorted(_layers(shapes, _FUSION))
    return next((n - first_layer for n in stored if n > first_layer and n not in crossing), None)


def _layers(keys: Iterable[str], prefix: str) -> set[int]:
    found = (re.match(rf"{re.escape(prefix)}\.{LAYER_NUMBER}\.", key) for key in keys)
    return {int(match[1]) for match in found if match}


def _count(layers: set[int]) -> int:
    return max(layers) + 1 if layers else 0
