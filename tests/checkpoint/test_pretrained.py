from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file

import mplug2_fast as mf
from mplug2_fast.checkpoint import convert, needed_keys

POSITIONS = "visual_encoder.visual.positional_embedding"


def assert_holds(model, weights, dtype=torch.float32):
    views = model.released_parameters()
    assert views.keys() == needed_keys(model.config, model.task).keys()
    for key, view in views.items():
        assert view.dtype == dtype
        assert torch.equal(view, weights[key].to(dtype)), key


def prefixed(weights):
    return {f"module.{key}": tensor for key, tensor in weights.items()}


FORMS = {
    "model": lambda w: {"model": w, "epoch": 1},
    "module": lambda w: {"module": w, "global_steps": 7, "args": argparse.Namespace(local_rank=0)},
    "prefixed": lambda w: {"model": prefixed(w)},
    "bare": lambda w: w,
    "bare prefixed": prefixed,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_files(tmp_path, golden_weights, form, legacy):
    path = tmp_path / "checkpoint.pth"
    torch.save(FORMS[form](golden_weights), path, _use_new_zipfile_serialization=not legacy)
    assert_holds(mf.from_pretrained(path, task="captioning"), golden_weights)


def test_training_checkpoint(golden_file, golden_weights):
    model = mf.from_pretrained(golden_file)
    assert isinstance(model, mf.MPlug2ForQuestionAnswering)
    assert not model.training
    assert model.config.vision.num_frames == 4
    assert model.config.generation.num_beams == 3
    assert_holds(model, golden_weights)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_loaded_model_computes_what_the_reference_does(golden_file, golden_weights):
    model = mf.from_pretrained(golden_file, task="captioning")
    reference = mf.reference.MPlug2ForCaptioning(model.config).eval()
    mf.load_released(reference, golden_weights)
    video = torch.randn(2, 3, 4, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_video(video), reference.encode_video(video), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_with_sizes_from_shapes(tmp_path, golden_weights, golden_config, prefix):
    path = tmp_path / "weights.safetensors"
    save_file({prefix + key: tensor.clone() for key, tensor in golden_weights.items()}, path)
    assert_holds(mf.from_pretrained(path, task="captioning"), golden_weights)
    with pytest.raises(mf.CheckpointError, match=r"text\.fusion_layers .*pass config="):
        mf.from_pretrained(path, task="question_answering")
    model = mf.from_pretrained(path, config=golden_config)
    assert model.config == golden_config
    assert_holds(model, golden_weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("task", ["captioning", "question_answering"])
def test_dtypes(golden_file, golden_weights, task, dtype):
    assert_holds(mf.from_pretrained(golden_file, task=task, dtype=dtype), golden_weights, dtype)


def test_default_dtype_is_torchs(golden_file, golden_weights, tmp_path):
    folder = convert(golden_file, tmp_path / "half", dtype=torch.bfloat16)
    rounded = {key: tensor.bfloat16() for key, tensor in golden_weights.items()}
    assert_holds(mf.from_pretrained(folder), rounded)


def test_tasks_of_a_captioning_directory(golden_file, golden_weights, tmp_path):
    folder = convert(golden_file, tmp_path / "captioning", task="captioning")
    assert isinstance(mf.from_pretrained(folder), mf.MPlug2ForCaptioning)
    with pytest.raises(mf.CheckpointError) as caught:
        mf.from_pretrained(folder, task="question_answering")
    assert str(caught.value).startswith(f"{folder} does not fit a question answering model")
    assert "missing: 89 entries" in str(caught.value)
    assert 'task="captioning"' in str(caught.value)


def test_question_answering_directory_serves_captioning(golden_file, golden_weights, tmp_path):
    folder = convert(golden_file, tmp_path / "both")
    assert isinstance(mf.from_pretrained(folder), mf.MPlug2ForQuestionAnswering)
    model = mf.from_pretrained(folder, task="captioning")
    assert isinstance(model, mf.MPlug2ForCaptioning)
    assert_holds(model, golden_weights)


def test_another_image_size_resizes_positions(golden_file, golden_config, golden_weights):
    config = golden_config.replace(image_size=84)
    model = mf.from_pretrained(golden_file, task="captioning", config=config)
    by_hand = mf.MPlug2ForCaptioning(config)
    fit = mf.load_released(by_hand, golden_weights)
    assert POSITIONS in fit.resized
    resized = model.released_parameters()[POSITIONS]
    assert resized.shape == (37, 128)
    assert torch.equal(resized, by_hand.released_parameters()[POSITIONS])


def test_report_names_the_file(tmp_path, golden_weights, golden_config):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": golden_weights | {"extra.weight": torch.zeros(1)}}, path)
    with pytest.raises(mf.CheckpointError) as caught:
        mf.from_pretrained(path, task="captioning")
    assert str(caught.value).startswith(f"{path} does not fit")
    assert "extra.weight" in str(caught.value)


def test_differing_twins_are_refused(tmp_path, golden_weights):
    path = tmp_path / "checkpoint.pth"
    twin = "text_decoder.cls.predictions.decoder.bias"
    torch.save({"model": golden_weights | {twin: torch.ones(400)}}, path)
    with pytest.raises(mf.CheckpointError, match=f"^{path}: {twin} differs"):
        mf.from_pretrained(path, task="captioning")


def test_quantised_weights_are_refused(tmp_path, golden_weights):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {key: tensor.to(torch.int8) for key, tensor in golden_weights.items()}}, path)
    with pytest.raises(mf.CheckpointError, match=r"180 entries are not floating point"):
        mf.from_pretrained(path, task="captioning")


def test_unknown_task(golden_file):
    with pytest.raises(mf.ConfigError, match="retrieval"):
        mf.from_pretrained(golden_file, task="retrieval")
