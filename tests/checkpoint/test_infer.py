from __future__ import annotations

import re

import pytest

import mplug2_fast as mf
from mplug2_fast.checkpoint import infer_config, official_names
from mplug2_fast.tasks import TASKS

VISUAL = "visual_encoder.visual"


def test_large_is_the_preset(large_shapes):
    found = infer_config(large_shapes)
    assert found.config == mf.MPlug2Config.preset("large")
    assert found.modules == {"vision", "universal", "text", "fusion", "decoder", "clip"}
    assert found.assumed["text.fusion_layers"] == 6
    assert found.undetermined == {}


def test_base_is_the_preset():
    config = mf.MPlug2Config.preset("base")
    shapes = official_names(config.replace(fusion_layers=12), "question_answering").needed
    assert infer_config(shapes).config == config


def test_golden_sizes(golden_shapes, golden_config):
    released = {"model_num_frames": 4, "fusion_layers": 2, "prompt": "a video of", "beam_size": 5}
    found = infer_config(golden_shapes, released)
    assert found.config == golden_config
    assert found.assumed == {"text.num_attention_heads": 2, "text.stride_layer": 1000}


def test_stored_configuration_fills_what_shapes_leave_open(golden_shapes):
    released = {
        "model_num_frames": 8,
        "stride_layer": 2,
        "num_attention_heads": 4,
        "fusion_layers": 3,
        "beam_size": 2,
        "min_length": 6,
        "max_length": 30,
        "prompt": "",
        "image_res": 999,
    }
    config = infer_config(golden_shapes, released).config
    assert (config.vision.num_frames, config.vision.image_size) == (8, 56)  # shapes win
    assert (config.text.stride_layer, config.text.num_attention_heads, config.text.fusion_layers) == (2, 4, 3)
    generation = config.generation
    assert (generation.num_beams, generation.min_length, generation.max_length) == (2, 6, 30)
    assert (generation.prompt, generation.prompt_tokens) == ("", 0)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "width": 192,
            "temporal_downsampling": True,
            "temporal_kernel_size": 5,
            "temporal_reduction": 4,
            "mlp_ratio": 2,
        },
        {"text_encoder_layers": 6, "text_decode_layers": 3, "num_latents": 7, "type_vocab_size": 1, "patch_size": 28},
    ],
    ids=["vision", "text"],
)
@pytest.mark.parametrize("task", ["captioning", "question_answering"])
def test_used_keys_alone_tell_the_sizes(golden_config, changes, task):
    config = golden_config.replace(**changes)
    shapes = official_names(config, task).needed
    found = infer_config(shapes)
    assert found.modules == config.modules_for([TASKS[task]])
    assert official_names(found.config, task).needed == shapes
    assert found.undetermined == {}


def test_connected_layers_tell_the_stride(golden_config):
    config = golden_config.replace(stored_layers=7, fusion_layers=6, stride_layer=2)
    found = infer_config(official_names(config, "question_answering").needed)
    assert (found.config.text.fusion_layers, found.config.text.stride_layer) == (6, 2)


def test_fusion_layers_of_an_unknown_size_are_not_guessed(golden_shapes):
    assert infer_config(golden_shapes).undetermined == {"text.fusion_layers": "fusion"}


def test_a_lost_fusion_layer_changes_no_size(large_shapes):
    shapes = {key: shape for key, shape in large_shapes.items() if "fusion_encoder.encoder.layer.0." not in key}
    assert infer_config(shapes).config == mf.MPlug2Config.preset("large")


def test_no_fusion_encoder_means_captioning(golden_shapes):
    shapes = {key: shape for key, shape in golden_shapes.items() if not key.startswith("fusion_encoder.")}
    assert infer_config(shapes).modules == mf.MPlug2Config().modules_for([TASKS["captioning"], TASKS["clip"]])


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (f"{VISUAL}.positional_embedding", (12, 128), "12 rows"),
        (f"{VISUAL}.conv1.weight", (128, 3, 2, 14, 14), "2 frames"),
        (f"{VISUAL}.conv1.weight", (128, 3, 14, 14), "no mPLUG-2 model has"),
        (f"{VISUAL}.conv1.weight", (100, 3, 1, 14, 14), "multiple of the head dimension"),
        ("text_encoder.encoder.layer.2.latents", (0, 128), "num_latents"),
        (f"{VISUAL}.conv1.weight", None, "determine the model's sizes are missing"),
    ],
)
def test_impossible_shapes(golden_shapes, key, shape, message):
    shapes = dict(golden_shapes)
    shapes.pop(key)
    if shape is not None:
        shapes[key] = shape
    with pytest.raises(mf.CheckpointError, match=re.escape(message)):
        infer_config(shapes)


def test_another_model(golden_shapes):
    with pytest.raises(mf.CheckpointError, match=r"not the weights of an mPLUG-2 or mPLUG model[\s\S]*remedy"):
        infer_config({"layer1.0.conv1.weight": (64, 64, 3, 3)})
