"""The bulk benchmark on a few files."""

import json

import pytest

from bench import bulk


def test_decoding_and_the_model_alone_and_together(tmp_path):
    assert bulk.main(["--files", "5", "--size", "32", "--repeats", "1", "--out", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    seconds = found["seconds"]
    assert found["ratio"] == pytest.approx(seconds["run"] / max(seconds["decoding"], seconds["model"]))
    assert found["met"] == (found["ratio"] <= bulk.BAR)
    assert 0 < found["model_share"] < 1
    assert found["machine"]["cores"] > 0
    assert "5 clips of 32 px, medians of 1: decoding " in bulk.markdown(found)


def test_memory_is_sampled_to_the_end(tmp_path):
    assert bulk.main(["--soak", "60", "--out", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["files"], found["failed"]) == (60, 6)
    assert found["at_the_end"]["files"] == 60
    assert all(sample["run"] > 10**7 for sample in found["samples"])
    assert bulk.markdown(found).startswith("60 files, 6 of them broken: the run has ")
    assert max(sample["decoding"] for sample in found["samples"]) > 10**6
