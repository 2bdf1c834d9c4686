"""Every kind of broken file gives one clear error: the file, the reason, the remedy."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mplug2_fast as mf
from mplug2_fast.checkpoint import convert, inspect, vocabulary_path


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def truncated(path: Path, fraction: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


def a_file(path: Path, kind: str, weights: dict[str, torch.Tensor]) -> None:
    """Write the broken file `kind` at `path`."""
    if kind in ("truncated zip", "cut zip header"):
        torch.save({"model": weights}, path)
        truncated(path, 0.7 if kind == "truncated zip" else 0.001)
    elif kind == "truncated legacy":
        torch.save({"model": weights}, path, _use_new_zipfile_serialization=False)
        truncated(path, 0.7)
    elif kind == "cut legacy header":
        torch.save({"model": weights}, path, _use_new_zipfile_serialization=False)
        truncated(path, 0.001)
    elif kind in ("truncated safetensors", "cut safetensors header"):
        save_file({"visn_emb_norm.weight": torch.zeros(500)}, path)
        truncated(path, 0.5 if kind == "truncated safetensors" else 0.02)
    elif kind == "a zip archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model": {}}))
    elif kind == "list":
        torch.save([torch.zeros(1)], path)
    elif kind == "no weights":
        torch.save({"epoch": 3, "lr": 0.1}, path)
    elif kind == "no weights inside":
        torch.save({"model": {"epoch": 3}}, path)
    elif kind == "numbers among weights":
        torch.save({"model": {"visn_emb_norm.weight": torch.zeros(1), "epoch": 3}}, path)
    else:
        contents = {
            "empty": b"",
            "text": b"these are not the weights you are looking for\n",
            "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "html": b"\n<!DOCTYPE html><html>quota exceeded</html>",
            "noise": bytes(range(7, 256)) * 10,
            "gzip": b"\x1f\x8b\x08\x00" + bytes(100),
        }
        path.write_bytes(contents[kind])


BROKEN = [
    ("weights.pth", "empty", "the file is empty"),
    ("weights.pth", "text", "a text file"),
    ("weights.pth", "lfs", "git lfs pull"),
    ("weights.pth", "html", "a web page"),
    ("weights.pth", "noise", "not a checkpoint"),
    ("weights.pth", "gzip", "gzip"),
    ("weights.pth", "pickle", "a plain pickle"),
    ("weights.pth", "truncated zip", "truncated"),
    ("weights.pth", "cut zip header", "truncated"),
    ("weights.pth", "truncated legacy", "not a readable torch.save file"),
    ("weights.pth", "cut legacy header", "not a readable torch.save file"),
    ("weights.pth", "a zip archive", "not a readable torch.save file"),
    ("weights.pth", "list", "no state dict but list"),
    ("weights.pth", "no weights", "holds no weights, only epoch, lr"),
    ("weights.pth", "no weights inside", "holds no weights in its 'model' entry, only epoch"),
    ("weights.pth", "numbers among weights", "no tensors, such as epoch (int)"),
    ("weights.safetensors", "empty", "the file is empty"),
    ("weights.safetensors", "text", "a text file"),
    ("weights.safetensors", "lfs", "git lfs pull"),
    ("weights.safetensors", "truncated safetensors", "truncated or corrupt"),
    ("weights.safetensors", "cut safetensors header", "truncated or corrupt"),
    ("weights.bin", "truncated safetensors", "truncated or corrupt"),
]


def refusal(path: Path) -> str:
    """The message with which all functions refuse `path`."""
    messages = set()
    for enter in (mf.from_pretrained, inspect, lambda path: convert(path, path.parent / "converted")):
        with pytest.raises(mf.CheckpointError) as caught:
            enter(path)
        messages.add(str(caught.value))
    (message,) = messages
    assert not (path.parent / "converted").exists()
    return message


@pytest.mark.parametrize(("name", "kind", "reason"), BROKEN, ids=[f"{name}-{kind}" for name, kind, _ in BROKEN])
def test_broken_files(tmp_path, golden_weights, name, kind, reason):
    path = tmp_path / name
    a_file(path, kind, golden_weights)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert ";" in message  # the remedy follows
    assert "\n" not in message


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, golden_weights, legacy):
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    content = {"model": golden_weights, "extra": RunsCode(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    message = refusal(path)
    assert "refused" in message
    assert "mkdir" in message
    assert "isolated environment" in message
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have run


def test_absent_path(tmp_path):
    assert "no such file or directory" in refusal(tmp_path / "absent.pth")


@pytest.fixture
def folder(golden_file: Path, tmp_path: Path) -> Path:
    return convert(golden_file, tmp_path / "folder" / "inner")


def test_directory_without_files(tmp_path):
    empty = tmp_path / "a" / "b"
    empty.mkdir(parents=True)
    message = refusal(empty)
    assert "lacks config.json and model.safetensors" in message
    assert "it has nothing" in message


def test_directory_without_weights(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "lacks model.safetensors (it has config.json, weights.safetensors)" in refusal(folder)


def test_directory_with_truncated_weights(folder):
    truncated(folder / "model.safetensors", 0.9)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'model.safetensors'}: ")
    assert "truncated or corrupt" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{not json", "not readable as JSON"),
        ("[]", "no configuration but list"),
        (json.dumps({"tasks": "retrieval"}), "its tasks are 'retrieval', not a list"),
        (json.dumps({"family": "blip"}), "its family 'blip' is not one of mplug2"),
        (json.dumps({"vision": {"depth": 3}}), "unknown configuration fields: vision.depth"),
        (json.dumps({"vision": {"width": "wide"}}), "must be a positive whole number"),
        (json.dumps({"vision": 3}), "config.json: "),
    ],
)
def test_directory_with_a_broken_configuration(folder, content, reason):
    (folder / "config.json").write_text(content)
    message = refusal(folder)
    assert reason in message
    assert message.startswith(f"{folder / 'config.json'}: ")


def test_directory_whose_configuration_is_of_another_model(folder, golden_config):
    other = {"task": "captioning", **golden_config.replace(text_decode_layers=3, vocab_size=500).to_dict()}
    (folder / "config.json").write_text(json.dumps(other))
    with pytest.raises(mf.CheckpointError) as caught:
        mf.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "missing: 26 entries" in str(caught.value)
    assert "of another shape: 2 entries" in str(caught.value)


def test_vocabulary_path(folder, golden_file):
    assert vocabulary_path(folder) is None
    assert vocabulary_path(golden_file) is None
    (folder / "vocab.txt").write_text("[PAD]\n")
    assert vocabulary_path(folder) == folder / "vocab.txt"
    assert vocabulary_path(str(folder)) == folder / "vocab.txt"
