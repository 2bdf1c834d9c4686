"""The sizes of an mPLUG-2 model, read from the shapes of its official state dict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mplug2_fast.errors import CheckpointError, ConfigError
from mplug2_fast.models.family import InferredConfig
from mplug2_fast.models.mplug2.config import UNIVERSAL, MPlug2Config
from mplug2_fast.models.mplug2.official_names import MPlug2Names, official_name, stack_of
from mplug2_fast.models.names import CONTRAST, DECODER, FUSION, LAYER_NUMBER, MATCHING, TEXT, VISION, Shape

_HEAD_DIM = 64
_FUSION_DEFAULTS = {24: (6, 1000), 12: (3, 100)}
"""Stored layers -> the official (fusion_layers, stride_layer)."""

_PATCHES, _POSITIONS = "visual.patch_weight", "visual.positional_embedding"
_TEMPORAL, _VISION_MLP = "visual.blocks.0.lmhra1.conv.weight", "visual.blocks.0.mlp.c_fc.weight"
_WORDS, _TOKENS = "decoder.embeddings.word.weight", "decoder.embeddings.position.weight"
_TYPES, _TEXT_MLP = "decoder.embeddings.token_type.weight", "decoder.layers.0.intermediate.dense.weight"
_LATENTS, _FUSION_LAYER = "universal.latents", "fusion.layers.0.intermediate.dense.weight"
_TEXT_LAYER = "text.layers.0.intermediate.dense.weight"
_ANCHORS = {_PATCHES: 5, _POSITIONS: 2, _TEMPORAL: 5, _VISION_MLP: 2, _WORDS: 2, _TOKENS: 2, _TYPES: 2, _TEXT_MLP: 2}
"""Our parameters whose shapes determine the sizes -> their number of axes."""


def infer(shapes: Mapping[str, Shape], stated: Mapping[str, Any]) -> InferredConfig:
    """See `mplug2_fast.models.infer_config`."""
    _require_anchors(shapes)
    modules = _modules(shapes)
    vision, text = _vision_sizes(shapes), _text_sizes(shapes)
    assumed: dict[str, Any] = {}
    undetermined: dict[str, str] = {}

    def told(part: str, name: str, default: Any, source: str | None = None) -> Any:
        value = stated.get(source or name)
        if value is None:
            assumed[f"{part}.{name}"] = value = default
        elif type(value) is not (str if name == "prompt" else int):
            kind = type(value).__name__
            raise CheckpointError(
                f"its own configuration states {source or name} as {kind}: correct it, or pass config="
            )
        return value

    defaults = MPlug2Config.preset("large")
    vision["num_frames"] = told("vision", "num_frames", defaults.vision.num_frames, "model_num_frames")
    if vision["temporal_downsampling"]:
        vision["temporal_stride"] = told("vision", "temporal_stride", defaults.vision.temporal_stride)
    heads = max(1, text["hidden_size"] // _HEAD_DIM)
    text["num_attention_heads"] = told("text", "num_attention_heads", heads)
    if FUSION in modules:
        stored = text["stored_layers"]
        fusion, stride = _FUSION_DEFAULTS.get(stored, (None, 1000))
        first = min(_layers(shapes, stack_of(_FUSION_LAYER)))
        # The whole stack has embeddings beside it, which no model uses.
        embeddings = stack_of(_FUSION_LAYER).replace("encoder.layer", "embeddings.")
        whole = any(key.startswith(embeddings) for key in shapes)
        if first > 0 and not whole:  # what never runs is gone already
            text["fusion_layers"] = stored - first
        elif fusion is None and stated.get("fusion_layers") is None:
            undetermined = {"text.fusion_layers": FUSION}
        else:
            text["fusion_layers"] = told("text", "fusion_layers", fusion)
        connected = _first_connected(shapes, stored - text["fusion_layers"])
        text["stride_layer"] = connected or told("text", "stride_layer", stride)
    generation = {
        "num_beams": told("generation", "num_beams", defaults.generation.num_beams, "beam_size"),
        "prompt": told("generation", "prompt", defaults.generation.prompt),
    }
    generation["prompt_length"] = stated.get("prompt_length")  # None: counted from the prompt
    generation |= {name: stated[name] for name in ("min_length", "max_length") if stated.get(name) is not None}
    contrast = {"embed_dim": shapes["vision_proj.weight"][0]} if CONTRAST in modules else {}
    try:
        config = MPlug2Config().replace(vision=vision, text=text, generation=generation, contrast=contrast)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"the shapes of the checkpoint make no model: {error}") from error
    return InferredConfig(config, modules, assumed, undetermined)


def _modules(shapes: Mapping[str, Shape]) -> frozenset[str]:
    fusion = bool(_layers(shapes, stack_of(_FUSION_LAYER)))
    embeddings = official_name("text.embeddings.word.weight").removesuffix("word_embeddings.weight")
    words = any(key.startswith(embeddings) for key in shapes)
    heads = {CONTRAST} if {"vision_proj.weight", "text_proj.weight"} <= shapes.keys() else set()
    heads |= {MATCHING} if "itm_head.weight" in shapes else set()
    return frozenset({VISION, UNIVERSAL, DECODER} | ({TEXT, FUSION} if fusion and words else set()) | heads)


def recognise(shapes: Mapping[str, Shape]) -> int:
    """How many of the parameters of an mPLUG-2 model a state dict has. Zero if its patches are those of an image."""
    if len(shapes.get(official_name(_PATCHES), ())) == 4 and not any(".lmhra1." in key for key in shapes):
        return 0
    return len(MPlug2Names(MPlug2Config(), frozenset(MPlug2Config.modules)).needed.keys() & shapes.keys())


def _require_anchors(shapes: Mapping[str, Shape]) -> None:
    anchors = {official_name(path): rank for path, rank in _ANCHORS.items()}
    absent = [key for key in anchors if key not in shapes]
    if not _latents(shapes):
        absent.append(f"{stack_of(_LATENTS)}.*.{_LATENTS.partition('.')[2]}")
    if absent:
        listing = "".join(f"\n  {key}" for key in absent)
        raise CheckpointError(
            f"keys that determine the model's sizes are missing:{listing}\n"
            "  remedy: use a whole checkpoint of mPLUG-2, with its official key names"
        )
    flat = [
        f"{key} {list(shapes[key])}" for key, rank in anchors.items() if len(shapes[key]) != rank or 0 in shapes[key]
    ]
    if flat:
        raise CheckpointError(f"shapes that no mPLUG-2 model has: {', '.join(flat)}")


def _vision_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    positions, conv = official_name(_POSITIONS), official_name(_PATCHES)
    width, _, frames, patch, _ = shapes[conv]
    tokens = shapes[positions][0]
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1 or not side:
        raise CheckpointError(
            f"{positions} has {tokens} rows, which is not a class token and a square of patches: "
            "the checkpoint was trained on another kind of input"
        )
    if frames not in (1, 3):
        raise CheckpointError(f"{conv} spans {frames} frames; an mPLUG-2 model has 1, or 3 with temporal down-sampling")
    inner, _, kernel, _, _ = shapes[official_name(_TEMPORAL)]
    return {
        "width": width,
        "layers": _count(_layers(shapes, stack_of(_TEMPORAL))),
        "patch_size": patch,
        "image_size": side * patch,
        "head_dim": _HEAD_DIM,
        "mlp_ratio": max(1, shapes[official_name(_VISION_MLP)][0] // width),
        "temporal_kernel_size": kernel,
        "temporal_reduction": max(1, width // inner),
        "temporal_downsampling": frames == 3,
    }


def _text_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    vocabulary, hidden = shapes[official_name(_WORDS)]
    layers = _count(_layers(shapes, stack_of(_TEXT_LAYER)))
    latents = _latents(shapes)
    first_universal = min(latents)
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": shapes[official_name(_TEXT_MLP)][0],
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes[official_name(_TOKENS)][0],
        "type_vocab_size": shapes[official_name(_TYPES)][0],
        "text_encoder_layers": layers,
        "num_uni_layer": layers - first_universal,
        "num_latents": latents[first_universal][0] if latents[first_universal] else 0,
        "text_decode_layers": _count(_layers(shapes, stack_of(_TEXT_MLP))),
    }
    stored = _layers(shapes, stack_of(_FUSION_LAYER))
    # Captioning has no use for the fusion encoder: any size that is consistent will do.
    sizes["stored_layers"] = _count(stored) or layers
    sizes["fusion_layers"] = min(_FUSION_DEFAULTS.get(sizes["stored_layers"], (1, 0))[0], sizes["stored_layers"])
    return sizes


def _first_connected(shapes: Iterable[str], first_layer: int) -> int | None:
    """Which of the fusion layers that run is the first without cross-attention, where those were left out."""
    cross = official_name("fusion.layers.0.crossattention.self.in_proj_weight").split(".")[4]
    crossing = _layers((key for key in shapes if f".{cross}." in key), stack_of(_FUSION_LAYER))
    stored = sorted(_layers(shapes, stack_of(_FUSION_LAYER)))
    return next((n - first_layer for n in stored if n > first_layer and n not in crossing), None)


def _latents(shapes: Mapping[str, Shape]) -> dict[int, Shape]:
    """Number of each layer that has latents -> their shape."""
    pattern = rf"{re.escape(stack_of(_LATENTS))}\.{LAYER_NUMBER}\.latents"
    return {int(found[1]): shape for key, shape in shapes.items() if (found := re.fullmatch(pattern, key))}


def _layers(keys: Iterable[str], prefix: str) -> set[int]:
    found = (re.match(rf"{re.escape(prefix)}\.{LAYER_NUMBER}\.", key) for key in keys)
    return {int(match[1]) for match in found if match}


def _count(layers: set[int]) -> int:
    return max(layers) + 1 if layers else 0
