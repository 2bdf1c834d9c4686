from __future__ import annotations

from collections import Counter

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast.checkpoint import convert, inspect


def test_training_checkpoint(golden_file, golden_weights, golden_config):
    found = inspect(golden_file)
    assert found.ok
    assert found.container == "torch.save file"
    assert found.file_bytes == golden_file.stat().st_size
    assert found.entries == 375
    assert found.parameters == sum(tensor.numel() for tensor in golden_weights.values())
    assert found.dtypes == {"float32": 372, "int64": 3}
    assert found.others == ("optimizer", "config", "epoch")
    assert (found.task, found.servable) == (
        "question_answering",
        ("captioning", "question_answering", "answer_ranking", "grounding", "clip", "text_generation"),
    )
    assert found.config == golden_config.replace(num_beams=3)
    assert found.counts() == {"needed": 269, "unused": 104, "tied": 2}
    assert found.needed_parameters == 2_144_272


def test_for_a_task(golden_file):
    found = inspect(golden_file, task="captioning")
    assert found.ok
    assert found.counts() == {"needed": 180, "unused": 193, "tied": 2}
    fusion = [group for group in found.groups if group.name == "fusion_encoder.encoder.layer.*"]
    assert [(group.kind, group.keys) for group in fusion] == [("unused", 104)]
    assert fusion[0].example.startswith("fusion_encoder.encoder.layer.0.")


def test_groups_add_up(golden_file):
    found = inspect(golden_file)
    assert sum(group.parameters for group in found.groups) == found.parameters
    names = Counter((group.kind, group.name) for group in found.groups)
    assert set(names.values()) == {1}


def test_directory(golden_file, tmp_path):
    folder = convert(golden_file, tmp_path / "folder", task="captioning", dtype=torch.bfloat16)
    (folder / "vocab.txt").write_text("[PAD]\n")
    found = inspect(folder)
    assert found.ok
    assert "directory" in found.container
    assert found.dtypes == {"bfloat16": 180}
    assert found.servable == ("captioning",)
    assert found.vocabulary
    assert found.assumed == {}
    assert found.counts() == {"needed": 180}


def test_what_does_not_fit_is_told(golden_weights, tmp_path):
    path = tmp_path / "checkpoint.pth"
    weights = golden_weights | {"category_head.weight": torch.zeros(2, 128), "visn_emb_norm.bias": torch.zeros(3)}
    del weights["visual_encoder.visual.ln_post.weight"]
    torch.save({"model": weights}, path)
    found = inspect(path, task="captioning")
    assert not found.ok
    assert found.counts() == {"needed": 178, "missing": 1, "mismatched": 1, "unexpected": 1, "unused": 193, "tied": 2}
    (missing,) = [group for group in found.groups if group.kind == "missing"]
    assert (missing.name, missing.example) == ("visual_encoder.visual", "visual_encoder.visual.ln_post.weight")
    assert missing.parameters == 128
    with pytest.raises(mf.CheckpointError) as caught:
        mf.from_pretrained(path, task="captioning")
    assert found.problem == str(caught.value)


def test_what_nothing_tells_is_said(golden_weights, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": golden_weights}, path)
    assert "text.fusion_layers" in inspect(path).problem
    captioning = inspect(path, task="captioning")
    assert captioning.ok
    assert captioning.assumed["vision.num_frames"] == 16


def test_another_model(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save({"layer1.0.conv1.weight": torch.zeros(4, 4, 3, 3), "fc.bias": torch.zeros(4)}, path)
    found = inspect(path)
    assert not found.ok
    assert found.config is None
    assert found.tasks == ()
    assert "not the weights of an mPLUG-2 or mPLUG model" in found.problem
    assert found.counts() == {"unexpected": 2}
