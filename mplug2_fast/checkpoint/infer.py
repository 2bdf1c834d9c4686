"""The sizes of a model, read from the shapes of its released state dict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mplug2_fast.checkpoint.keys import LAYER_NUMBER, POSITION_KEY, KeyMap, Shape
from mplug2_fast.errors import CheckpointError, ConfigError
from mplug2_fast.models.mplug2.config import TASKS, MPlug2Config, Task

_VISUAL = "visual_encoder.visual"
_HEAD_DIM = 64
_LATENTS = rf"text_encoder\.encoder\.layer\.{LAYER_NUMBER}\.latents"
_FUSION_DEFAULTS = {24: (6, 1000), 12: (3, 100)}
"""Stored layers -> the released (fusion_layers, stride_layer)."""


@dataclass(frozen=True)
class InferredConfig:
    """Sizes found in a state dict.

    Attributes:
        config: the whole configuration.
        tasks: the tasks for which the state dict has weights; a task is listed when its parts are there, so that a
            single missing key is reported as missing and does not turn the task off.
        assumed: dotted field -> value, for each one that neither the shapes nor the file's own configuration tell and
            that has the released default instead.
        undetermined: dotted fields that question answering needs and that have no released default at this size. They
            are no guess to make: a wrong one loads without complaint and answers noise.
    """

    config: MPlug2Config
    tasks: tuple[Task, ...]
    assumed: dict[str, Any]
    undetermined: tuple[str, ...] = ()


def infer_config(shapes: Mapping[str, Shape], released: Mapping[str, Any] | None = None) -> InferredConfig:
    """Infer the configuration behind a released state dict.

    Args:
        shapes: released key -> shape, `module.` prefixes already gone.
        released: the `config` entry that training stores in a checkpoint (the YAML's fields, BERT fields too where
            they are there). What the shapes tell wins over it.

    Raises `CheckpointError` when the keys that tell the sizes are not there, or contradict each other.
    """
    released = dict(released or {})
    _require_anchors(shapes)
    tasks = _tasks(shapes)
    vision, text = _vision_sizes(shapes), _text_sizes(shapes, tasks)
    assumed: dict[str, Any] = {}
    undetermined: tuple[str, ...] = ()

    def told(part: str, name: str, default: Any, source: str | None = None) -> Any:
        value = released.get(source or name)
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
    if "question_answering" in tasks:
        stored = text["stored_layers"]
        fusion, stride = _FUSION_DEFAULTS.get(stored, (None, 1000))
        first = min(_layers(shapes, "fusion_encoder.encoder.layer"))
        whole = any(key.startswith("fusion_encoder.embeddings.") for key in shapes)
        if first > 0 and not whole:  # what never runs is gone already
            text["fusion_layers"] = stored - first
        elif fusion is None and released.get("fusion_layers") is None:
            undetermined = ("text.fusion_layers",)
        else:
            text["fusion_layers"] = told("text", "fusion_layers", fusion)
        connected = _first_connected(shapes, stored - text["fusion_layers"])
        text["stride_layer"] = connected or told("text", "stride_layer", stride)
    generation = {
        "num_beams": told("generation", "num_beams", defaults.generation.num_beams, "beam_size"),
        "prompt": told("generation", "prompt", defaults.generation.prompt),
    }
    generation["prompt_length"] = released.get("prompt_length")  # None: counted from the prompt
    generation |= {name: released[name] for name in ("min_length", "max_length") if released.get(name) is not None}
    try:
        return InferredConfig(MPlug2Config().replace(**vision, **text, **generation), tasks, assumed, undetermined)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"the shapes of the checkpoint make no model: {error}") from error


def _tasks(shapes: Mapping[str, Shape]) -> tuple[Task, ...]:
    fusion = any(key.startswith("fusion_encoder.encoder.layer.") for key in shapes)
    words = any(key.startswith("text_encoder.embeddings.") for key in shapes)
    return TASKS if fusion and words else TASKS[:1]


def _require_anchors(shapes: Mapping[str, Shape]) -> None:
    anchors = {
        f"{_VISUAL}.conv1.weight": 5,
        POSITION_KEY: 2,
        f"{_VISUAL}.transformer.resblocks.0.lmhra1.conv.weight": 5,
        f"{_VISUAL}.transformer.resblocks.0.mlp.c_fc.weight": 2,
        "text_decoder.bert.embeddings.word_embeddings.weight": 2,
        "text_decoder.bert.embeddings.position_embeddings.weight": 2,
        "text_decoder.bert.embeddings.token_type_embeddings.weight": 2,
        "text_decoder.bert.encoder.layer.0.intermediate.dense.weight": 2,
    }
    absent = [key for key in anchors if key not in shapes]
    if not any(re.fullmatch(_LATENTS, key) for key in shapes):
        absent.append("text_encoder.encoder.layer.*.latents")
    if absent:
        listing = "".join(f"\n  {key}" for key in absent)
        nothing = not any(KeyMap(MPlug2Config(), "question_answering").needed.keys() & shapes.keys())
        problem = (
            "these are not the weights of an mPLUG-2 model"
            if nothing
            else "keys that tell the model's sizes are missing"
        )
        raise CheckpointError(
            f"{problem}; missing:{listing}\n  remedy: use a whole checkpoint of mPLUG-2, with its released key names"
        )
    flat = [
        f"{key} {list(shapes[key])}" for key, rank in anchors.items() if len(shapes[key]) != rank or 0 in shapes[key]
    ]
    if flat:
        raise CheckpointError(f"shapes that no mPLUG-2 model has: {', '.join(flat)}")


def _vision_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    width, _, frames, patch, _ = shapes[f"{_VISUAL}.conv1.weight"]
    tokens = shapes[POSITION_KEY][0]
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1 or not side:
        raise CheckpointError(
            f"{POSITION_KEY} has {tokens} rows, which is not a class token and a square of patches: "
            "the checkpoint was trained on another kind of input"
        )
    if frames not in (1, 3):
        raise CheckpointError(
            f"{_VISUAL}.conv1.weight spans {frames} frames; an mPLUG-2 model has 1, or 3 with temporal down-sampling"
        )
    inner, _, kernel, _, _ = shapes[f"{_VISUAL}.transformer.resblocks.0.lmhra1.conv.weight"]
    return {
        "width": width,
        "layers": _count(_layers(shapes, f"{_VISUAL}.transformer.resblocks")),
        "patch_size": patch,
        "image_size": side * patch,
        "head_dim": _HEAD_DIM,
        "mlp_ratio": max(1, shapes[f"{_VISUAL}.transformer.resblocks.0.mlp.c_fc.weight"][0] // width),
        "temporal_kernel_size": kernel,
        "temporal_reduction": max(1, width // inner),
        "temporal_downsampling": frames == 3,
    }


def _text_sizes(shapes: Mapping[str, Shape], tasks: tuple[Task, ...]) -> dict[str, Any]:
    embeddings = "text_decoder.bert.embeddings"
    vocabulary, hidden = shapes[f"{embeddings}.word_embeddings.weight"]
    layers = _count(_layers(shapes, "text_encoder.encoder.layer"))
    latents = {int(found[1]): shape for key, shape in shapes.items() if (found := re.fullmatch(_LATENTS, key))}
    first_universal = min(latents)
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": shapes["text_decoder.bert.encoder.layer.0.intermediate.dense.weight"][0],
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes[f"{embeddings}.position_embeddings.weight"][0],
        "type_vocab_size": shapes[f"{embeddings}.token_type_embeddings.weight"][0],
        "text_encoder_layers": layers,
        "num_uni_layer": layers - first_universal,
        "num_latents": latents[first_universal][0] if latents[first_universal] else 0,
        "text_decode_layers": _count(_layers(shapes, "text_decoder.bert.encoder.layer")),
    }
    stored = _layers(shapes, "fusion_encoder.encoder.layer")
    # Captioning has no use for the fusion encoder: any size that is consistent will do.
    sizes["stored_layers"] = _count(stored) or layers
    sizes["fusion_layers"] = min(_FUSION_DEFAULTS.get(sizes["stored_layers"], (1, 0))[0], sizes["stored_layers"])
    return sizes


def _first_connected(shapes: Iterable[str], first_layer: int) -> int | None:
    """Which of the fusion layers that run is the first without cross-attention, where those were left out."""
    crossing = _layers((key for key in shapes if ".crossattention." in key), "fusion_encoder.encoder.layer")
    stored = sorted(_layers(shapes, "fusion_encoder.encoder.layer"))
    return next((n - first_layer for n in stored if n > first_layer and n not in crossing), None)


def _layers(keys: Iterable[str], prefix: str) -> set[int]:
    found = (re.match(rf"{re.escape(prefix)}\.{LAYER_NUMBER}\.", key) for key in keys)
    return {int(match[1]) for match in found if match}


def _count(layers: set[int]) -> int:
    return max(layers) + 1 if layers else 0
