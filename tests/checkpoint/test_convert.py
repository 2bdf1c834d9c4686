from __future__ import annotations

import json
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mplug2_fast as mf
from mplug2_fast.checkpoint import convert, inspect, official_names, save_pretrained

TASKS = ("captioning", "question_answering")


@pytest.fixture
def model(golden_weights, golden_config):
    built = mf.MPlug2ForQuestionAnswering(golden_config)
    mf.load_released(built, golden_weights)
    return built


def assert_directory(folder, weights, config, task, dtype=torch.float32):
    """The directory form holds exactly what the task uses, bit by bit."""
    stated = json.loads((folder / "config.json").read_text())
    assert stated.pop("family") == "mplug2"
    assert stated.pop("tasks")[0] == task
    assert mf.MPlug2Config.from_dict(stated) == config
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == official_names(config, task).needed.keys()
    for key, tensor in stored.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, weights[key].to(dtype)), key


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_convert(golden_file, golden_weights, golden_config, tmp_path, task, dtype):
    folder = convert(golden_file, tmp_path / "new" / "folder", task=task, dtype=dtype)
    assert folder == tmp_path / "new" / "folder"
    config = golden_config.replace(num_beams=3)  # the file's own
    assert_directory(folder, golden_weights, config, task, dtype or torch.float32)
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [entry.name for entry in folder.parent.iterdir()] == ["folder"]
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode)


def test_default_task_is_the_widest(golden_file, golden_weights, golden_config, tmp_path):
    folder = convert(golden_file, tmp_path / "folder")
    assert_directory(folder, golden_weights, golden_config.replace(num_beams=3), "question_answering")


def test_mixed_dtypes_are_kept(golden_weights, golden_config, tmp_path):
    path = tmp_path / "mixed.safetensors"
    mixed = {k: v.bfloat16() if v.ndim == 1 else v.clone() for k, v in golden_weights.items() if v.is_floating_point()}
    save_file(mixed, path)
    stored = load_file(convert(path, tmp_path / "folder", task="captioning") / "model.safetensors")
    for key, tensor in stored.items():
        assert tensor.dtype == mixed[key].dtype
        assert torch.equal(tensor, mixed[key]), key


def test_weights_alone_are_enough(golden_file, golden_config, tmp_path):
    folder = convert(golden_file, tmp_path / "folder", config=golden_config.replace(fusion_layers=4))
    found = inspect(folder / "model.safetensors")
    assert found.config == golden_config.replace(fusion_layers=4)
    assert found.task == "question_answering"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_converting_twice_changes_nothing(golden_file, tmp_path):
    first = convert(golden_file, tmp_path / "first")
    (first / "vocab.txt").write_text("[PAD]\n")
    second = convert(first, tmp_path / "second")
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_positions_are_resized_for_another_image_size(golden_file, golden_config, tmp_path):
    config = golden_config.replace(image_size=84)
    folder = convert(golden_file, tmp_path / "folder", task="captioning", config=config)
    direct = mf.from_pretrained(golden_file, task="captioning", config=config).official_parameters()
    converted = mf.from_pretrained(folder).official_parameters()
    for key, tensor in direct.items():
        assert torch.equal(tensor, converted[key]), key


def test_nothing_is_overwritten(golden_file, model, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    for write in (lambda to: convert(golden_file, to), lambda to: save_pretrained(model, to)):
        with pytest.raises(mf.CheckpointError, match="not empty"):
            write(folder)
        with pytest.raises(mf.CheckpointError, match="a file has that name"):
            write(file)
    assert [entry.name for entry in folder.iterdir()] == ["notes.txt"]
    assert file.read_text() == "mine"


def test_an_empty_directory_is_filled(golden_file, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(golden_file, folder)
    assert mf.from_pretrained(folder).task == "question_answering"


@pytest.mark.parametrize("options", [{"dtype": torch.int8}, {"vocab": "absent.txt"}])
def test_a_failure_leaves_nothing_behind(model, tmp_path, options):
    with pytest.raises((mf.CheckpointError, FileNotFoundError)):
        save_pretrained(model, tmp_path / "new" / "folder", **options)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_checkpoint_that_does_not_fit_is_not_converted(golden_weights, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": golden_weights | {"extra.weight": torch.zeros(1)}}, path)
    with pytest.raises(mf.CheckpointError, match=r"extra\.weight"):
        convert(path, tmp_path / "folder", task="captioning")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("implementation", ["fast", "reference"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_save_and_load_again(golden_weights, golden_config, tmp_path, implementation, dtype):
    models = mf if implementation == "fast" else mf.reference
    built = models.MPlug2ForQuestionAnswering(golden_config)
    mf.load_released(built, golden_weights)
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("[PAD]\n")
    folder = save_pretrained(built, tmp_path / "folder", dtype=dtype, vocab=vocabulary)
    assert_directory(folder, golden_weights, golden_config, "question_answering", dtype or torch.float32)
    assert (folder / "vocab.txt").read_text() == "[PAD]\n"
    again = mf.from_pretrained(folder, dtype=dtype)
    assert again.config == golden_config
    for key, tensor in again.official_parameters().items():
        assert torch.equal(tensor, golden_weights[key].to(tensor.dtype)), key


def test_save_the_captioning_part(model, golden_weights, golden_config, tmp_path):
    folder = save_pretrained(model, tmp_path / "folder", task="captioning")
    assert_directory(folder, golden_weights, golden_config, "captioning")
    captioner = mf.from_pretrained(folder)
    with pytest.raises(mf.CheckpointError, match="lacks 89 entries"):
        save_pretrained(captioner, tmp_path / "other", task="question_answering")
    assert not (tmp_path / "other").exists()
