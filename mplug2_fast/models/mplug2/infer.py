"""The sizes of an mPLUG-2 model, read from the shapes of its official state dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mplug2_fast.errors import CheckpointError, ConfigError
from mplug2_fast.models.family import InferredConfig
from mplug2_fast.models.mplug2.config import CLIP, FUSION_MLM, TEXT_MLM, UNIVERSAL, MPlug2Config
from mplug2_fast.models.mplug2.official_names import MPlug2Names, official_name, stack_of
from mplug2_fast.models.names import CONTRAST, DECODER, FUSION, LAYER_NUMBER, MATCHING, TEXT, VISION, Shape
from mplug2_fast.models.sizes import (
    HEAD_DIM,
    Stated,
    count,
    first_connected,
    layers,
    patches_along_a_side,
    require_anchors,
)

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

_CLIP_ANCHORS = (
    "visual_encoder.token_embedding.weight",
    "visual_encoder.positional_embedding",
    "visual_encoder.text_projection",
)


def infer(shapes: Mapping[str, Shape], stated: Mapping[str, Any]) -> InferredConfig:
    """See `mplug2_fast.models.infer_config`."""
    _require_anchors(shapes)
    modules = _modules(shapes)
    vision, text = _vision_sizes(shapes), _text_sizes(shapes)
    own = Stated(stated)
    undetermined: dict[str, str] = {}

    defaults = MPlug2Config.preset("large")
    vision["num_frames"] = own.get("vision", "num_frames", defaults.vision.num_frames, "model_num_frames")
    if vision["temporal_downsampling"]:
        vision["temporal_stride"] = own.get("vision", "temporal_stride", defaults.vision.temporal_stride)
    heads = max(1, text["hidden_size"] // HEAD_DIM)
    text["num_attention_heads"] = own.get("text", "num_attention_heads", heads)
    if FUSION in modules:
        stored = text["stored_layers"]
        fusion, stride = _FUSION_DEFAULTS.get(stored, (None, 1000))
        first = min(layers(shapes, stack_of(_FUSION_LAYER)))
        # The whole stack has embeddings beside it, which no model uses.
        embeddings = stack_of(_FUSION_LAYER).replace("encoder.layer", "embeddings.")
        whole = any(key.startswith(embeddings) for key in shapes)
        if first > 0 and not whole:  # what never runs is gone already
            text["fusion_layers"] = stored - first
        elif fusion is None and "fusion_layers" not in own:
            undetermined = {"text.fusion_layers": FUSION}
        else:
            text["fusion_layers"] = own.get("text", "fusion_layers", fusion)
        connected = first_connected(shapes, stack_of(_FUSION_LAYER), stored - text["fusion_layers"])
        text["stride_layer"] = connected or own.get("text", "stride_layer", stride)
    generation = own.generation(defaults.generation.num_beams, defaults.generation.prompt)
    generation["prompt_length"] = stated.get("prompt_length")  # None: counted from the prompt
    contrast = {"embed_dim": shapes["vision_proj.weight"][0]} if CONTRAST in modules else {}
    clip = _clip_sizes(shapes) if CLIP in modules else {}
    parts = {"vision": vision, "text": text, "generation": generation, "contrast": contrast, "clip": clip}
    try:
        config = MPlug2Config().replace(**parts)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"the shapes of the checkpoint make no model: {error}") from error
    return InferredConfig(config, modules, own.assumed, undetermined)


def _modules(shapes: Mapping[str, Shape]) -> frozenset[str]:
    fusion = bool(layers(shapes, stack_of(_FUSION_LAYER)))
    embeddings = official_name("text.embeddings.word.weight").removesuffix("word_embeddings.weight")
    words = any(key.startswith(embeddings) for key in shapes)
    heads = {CONTRAST} if {"vision_proj.weight", "text_proj.weight"} <= shapes.keys() else set()
    heads |= {MATCHING} if "itm_head.weight" in shapes else set()
    heads |= {TEXT_MLM} if "text_encoder.cls.predictions.bias" in shapes else set()
    heads |= {FUSION_MLM} if "fusion_encoder.cls.predictions.bias" in shapes else set()
    heads |= {CLIP} if all(len(shapes.get(key, ())) == 2 for key in _CLIP_ANCHORS) else set()
    return frozenset({VISION, UNIVERSAL, DECODER} | ({TEXT, FUSION} if fusion and words else set()) | heads)


def recognise(shapes: Mapping[str, Shape]) -> int:
    """How many of the parameters of an mPLUG-2 model a state dict has. Zero if its patches are those of an image."""
    if len(shapes.get(official_name(_PATCHES), ())) == 4 and not any(".lmhra1." in key for key in shapes):
        return 0
    return len(MPlug2Names(MPlug2Config(), frozenset(MPlug2Config.modules)).needed.keys() & shapes.keys())


def _require_anchors(shapes: Mapping[str, Shape]) -> None:
    anchors = {official_name(path): rank for path, rank in _ANCHORS.items()}
    latents = f"{stack_of(_LATENTS)}.*.{_LATENTS.partition('.')[2]}"
    require_anchors(anchors, shapes, MPlug2Config.title, () if _latents(shapes) else (latents,))


def _clip_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    tokens, positions, projection = (shapes[key] for key in _CLIP_ANCHORS)
    return {
        "bpe_size": tokens[0],
        "token_width": tokens[1],
        "token_layers": count(layers(shapes, "visual_encoder.transformer.resblocks")),
        "token_heads": max(1, tokens[1] // HEAD_DIM),
        "context_length": positions[0],
        "joint_dim": projection[1],
    }


def _vision_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    positions, conv = official_name(_POSITIONS), official_name(_PATCHES)
    width, _, frames, patch, _ = shapes[conv]
    side = patches_along_a_side(positions, shapes)
    if frames not in (1, 3):
        raise CheckpointError(f"{conv} spans {frames} frames; an mPLUG-2 model has 1, or 3 with temporal down-sampling")
    inner, _, kernel, _, _ = shapes[official_name(_TEMPORAL)]
    return {
        "width": width,
        "layers": count(layers(shapes, stack_of(_TEMPORAL))),
        "patch_size": patch,
        "image_size": side * patch,
        "head_dim": HEAD_DIM,
        "mlp_ratio": max(1, shapes[official_name(_VISION_MLP)][0] // width),
        "temporal_kernel_size": kernel,
        "temporal_reduction": max(1, width // inner),
        "temporal_downsampling": frames == 3,
    }


def _text_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    vocabulary, hidden = shapes[official_name(_WORDS)]
    text_layers = count(layers(shapes, stack_of(_TEXT_LAYER)))
    latents = _latents(shapes)
    first_universal = min(latents)
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": shapes[official_name(_TEXT_MLP)][0],
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes[official_name(_TOKENS)][0],
        "type_vocab_size": shapes[official_name(_TYPES)][0],
        "text_encoder_layers": text_layers,
        "num_uni_layer": text_layers - first_universal,
        "num_latents": latents[first_universal][0] if latents[first_universal] else 0,
        "text_decode_layers": count(layers(shapes, stack_of(_TEXT_MLP))),
    }
    stored = layers(shapes, stack_of(_FUSION_LAYER))
    # Captioning has no use for the fusion encoder: any size that is consistent will do.
    sizes["stored_layers"] = count(stored) or text_layers
    sizes["fusion_layers"] = min(_FUSION_DEFAULTS.get(sizes["stored_layers"], (1, 0))[0], sizes["stored_layers"])
    return sizes


def _latents(shapes: Mapping[str, Shape]) -> dict[int, Shape]:
    """Number of each layer that has latents -> their shape."""
    pattern = rf"{re.escape(stack_of(_LATENTS))}\.{LAYER_NUMBER}\.latents"
    return {int(found[1]): shape for key, shape in shapes.items() if (found := re.fullmatch(pattern, key))}
