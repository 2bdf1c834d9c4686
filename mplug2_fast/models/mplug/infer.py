"""The sizes of an mPLUG model, read from the shapes of its official state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mplug2_fast.errors import CheckpointError, ConfigError
from mplug2_fast.models.family import InferredConfig
from mplug2_fast.models.mplug.config import MPlugConfig
from mplug2_fast.models.mplug.official_names import MPlugNames
from mplug2_fast.models.names import CONTRAST, DECODER, FUSION, MATCHING, TEXT, VISION, Shape
from mplug2_fast.models.shared_names import DECODER_BERT, POSITIONS, VISUAL
from mplug2_fast.models.sizes import (
    HEAD_DIM,
    Stated,
    count,
    first_connected,
    layers,
    patches_along_a_side,
    require_anchors,
)

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
    require_anchors({_PATCHES: 4, POSITIONS: 2, _MLP: 2}, shapes, MPlugConfig.title)
    if not modules & {TEXT, DECODER}:
        raise CheckpointError(
            "it has neither a text encoder nor a text decoder\n"
            "  remedy: use a whole checkpoint of mPLUG, with its official key names"
        )
    own = Stated(stated)
    undetermined: dict[str, str] = {}

    vision, text = _vision_sizes(shapes), _text_sizes(shapes, modules)
    vision["num_frames"] = own.get("vision", "num_frames", MPlugConfig().vision.num_frames, "num_frm_test")
    text["num_attention_heads"] = own.get("text", "num_attention_heads", max(1, text["hidden_size"] // HEAD_DIM))
    if FUSION in modules:
        stored = layers(shapes, _FUSION)
        whole = any(key.startswith("fusion_encoder.embeddings.") for key in shapes) or min(stored) == 0
        if not whole:  # what never runs is gone already
            text["fusion_layers"] = len(stored)
        else:
            text["fusion_layers"] = min(own.get("text", "fusion_layers", _FUSION_LAYERS), text["stored_layers"])
        stride = first_connected(shapes, _FUSION, text["stored_layers"] - text["fusion_layers"])
        if stride is None and vision["width"] not in _STRIDES and "stride_layer" not in own:
            undetermined["text.stride_layer"] = FUSION
        else:
            text["stride_layer"] = stride or own.get("text", "stride_layer", _STRIDES.get(vision["width"], 6))
    generation = own.generation(5, "")
    contrast = {"embed_dim": shapes["vision_proj.weight"][0]} if CONTRAST in modules else {}
    try:
        config = MPlugConfig().replace(vision=vision, text=text, generation=generation, contrast=contrast)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"the shapes of the checkpoint make no model: {error}") from error
    return InferredConfig(config, modules, own.assumed, undetermined)


def _modules(shapes: Mapping[str, Shape]) -> frozenset[str]:
    """The modules whose first parts are there."""
    found = {VISION}
    if layers(shapes, _TEXT) and any(key.startswith("text_encoder.embeddings.") for key in shapes):
        found.add(TEXT)
    if layers(shapes, _FUSION):
        found.add(FUSION)
    if layers(shapes, _DECODER):
        found.add(DECODER)
    if len(shapes.get("vision_proj.weight", ())) == 2 and "text_proj.weight" in shapes:
        found.add(CONTRAST)
    if any(key.startswith("itm_head.") for key in shapes):
        found.add(MATCHING)
    return frozenset(found)


def _vision_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    width, _, patch, _ = shapes[_PATCHES]
    side = patches_along_a_side(POSITIONS, shapes)
    return {
        "width": width,
        "layers": count(layers(shapes, _BLOCKS)),
        "patch_size": patch,
        "image_size": side * patch,
        "head_dim": HEAD_DIM,
        "mlp_ratio": max(1, shapes[_MLP][0] // width),
    }


def _text_sizes(shapes: Mapping[str, Shape], modules: frozenset[str]) -> dict[str, Any]:
    """From the decoder, or from the text encoder of a file without one."""
    root = DECODER_BERT if DECODER in modules else "text_encoder"
    words, positions, types = (
        f"{root}.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")
    )
    inner = f"{root}.encoder.layer.0.intermediate.dense.weight"
    require_anchors(dict.fromkeys((words, positions, types, inner), 2), shapes, MPlugConfig.title)
    vocabulary, hidden = shapes[words]
    defaults = MPlugConfig().text
    stored = count(layers(shapes, _FUSION))
    return {
        "hidden_size": hidden,
        "intermediate_size": shapes[inner][0],
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes[positions][0],
        "type_vocab_size": shapes[types][0],
        "text_encoder_layers": count(layers(shapes, _TEXT)) or defaults.text_encoder_layers,
        "text_decode_layers": count(layers(shapes, _DECODER)) or defaults.text_decode_layers,
        "stored_layers": stored or defaults.stored_layers,
        "fusion_layers": min(_FUSION_LAYERS, stored or defaults.stored_layers),
    }
