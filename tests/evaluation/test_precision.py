"""`mplug2-fast compare-dtypes`, and 8-bit weights on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mplug2_fast.checkpoint import from_pretrained
from mplug2_fast.cli import app
from mplug2_fast.errors import ConfigError, DataError
from mplug2_fast.evaluation import compare_dtypes
from mplug2_fast.evaluation.precision import MAX_KEPT
from mplug2_fast.models.eight_bit import blocks_of
from mplug2_fast.predict import Captioner, Predictor
from mplug2_fast.predict.predictor import TINY_MODEL, TINY_MPLUG

QUESTION = "what shape is it"
CLIPS = sorted(map(str, (Path(__file__).parents[2] / "examples/moving_shapes/clips").glob("*.mp4")))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def captioners(**options):
    return Captioner(TINY_MODEL), Captioner(TINY_MODEL, **options)


def test_errors_by_block():
    reference, other = captioners(dtype="int8")
    found = compare_dtypes(reference, other, CLIPS[:2])
    assert (found.task, found.dtype, found.against, found.files) == ("captioning", "int8", "float32", 2)
    assert found.agreement == 1
    assert not found.differences
    assert [block.name for block in found.blocks] == [block.name for block in blocks_of(reference.model)]
    assert all(0 < block.alone < 0.05 and 0 < block.together < 0.1 for block in found.blocks)
    assert sum(block.share for block in found.blocks) == pytest.approx(1)
    assert 0 < found.visual_error < 0.1
    assert found.logits_error is not None
    assert 0 < found.logits_error < 0.1
    assert 1 <= len(found.keep) <= MAX_KEPT
    assert found.keep[0] == max(found.blocks, key=lambda block: block.share).name
    assert not reference.model.visual.blocks[0]._forward_hooks


def test_wide_blocks_have_a_small_error():
    found = compare_dtypes(*captioners(dtype="int8", keep=["decoder", "universal"]), CLIPS[:1])
    wide = [block.alone for block in found.blocks if block.name.startswith(("decoder", "universal"))]
    rounded = [block.alone for block in found.blocks if block.name.startswith("visual")]
    assert max(wide) < min(rounded)


def test_the_same_dtype_is_exact():
    found = compare_dtypes(*captioners(dtype="float32"), CLIPS[:1])
    assert max(block.together for block in found.blocks) < 1e-5
    assert found.max_score_difference < 1e-5


def test_differences_are_listed(monkeypatch):
    reference, other = captioners(dtype="float32")
    other.model = from_pretrained(TINY_MODEL, "captioning")
    other.model.decoder.head_bias.data[:] = 0
    other.model.decoder.head.weight.data.neg_()
    found = compare_dtypes(reference, other, CLIPS[:2])
    assert found.agreement < 1
    assert found.differences[0].path == CLIPS[0]
    assert found.differences[0].reference != found.differences[0].found


@pytest.mark.parametrize("task", ["grounding", "retrieval"])
def test_tasks_that_generate_no_text(task):
    reference, other = (Predictor(TINY_MPLUG, task=task, dtype=dtype) for dtype in ("float32", "int8"))
    if task == "retrieval":
        with pytest.raises(ConfigError):
            compare_dtypes(reference, other, CLIPS[:1])
        return
    found = compare_dtypes(reference, other, CLIPS[:1], "a red square")
    assert found.logits_error is None
    assert any(block.name.startswith("fusion") and block.alone > 0 for block in found.blocks)


def test_wrong_input(tmp_path):
    both = captioners(dtype="int8")
    with pytest.raises(ConfigError, match="needs files"):
        compare_dtypes(*both, [])
    with pytest.raises(ConfigError, match="reads no text"):
        compare_dtypes(*both, CLIPS[:1], "what")
    with pytest.raises(DataError, match=r"none\.mp4"):
        compare_dtypes(*both, [str(tmp_path / "none.mp4")])


def test_the_command():
    found = run("compare-dtypes", TINY_MODEL, *CLIPS[:2], "--task", "question_answering", "--text", QUESTION, "--json")
    assert found.exit_code == 0, found.output
    values = json.loads(found.stdout)
    assert values["task"] == "question_answering"
    assert any(block["name"].startswith("fusion") and block["alone"] > 0 for block in values["blocks"])
    lines = run("compare-dtypes", TINY_MODEL, CLIPS[0], "--task", "captioning", "--keep", "decoder.*").stdout.split(
        "\n"
    )
    assert any(line.startswith("dtypes") and "int8 but decoder.*, against float32" in line for line in lines)
    assert any(line.startswith("--keep '") for line in lines)


def test_fp8_is_judged_without_a_gpu():
    options = ("compare-dtypes", TINY_MODEL, CLIPS[0], "--task", "captioning", "--dtype", "fp8", "--device", "cpu")
    refused = run(*options)
    assert refused.exit_code != 0
    assert "e4m3 products need a GPU of compute capability 8.9 or later" in refused.stderr
    values = json.loads(run(*options, "--backend", "torch", "--json").stdout)
    assert (values["dtype"], values["against"]) == ("fp8", "float32")
    assert 0.01 < values["visual_error"] < 0.06


def test_commands_take_int8(tmp_path):
    wide = run("caption", *CLIPS[:2])
    found = run("caption", *CLIPS[:2], "--dtype", "int8", "--keep", "decoder.*")
    assert (found.exit_code, found.stdout) == (0, wide.stdout), found.output
    converted = run("convert", TINY_MODEL, tmp_path / "int8", "--dtype", "int8", "--keep", "universal")
    assert converted.exit_code == 0, converted.output
    described = run("inspect", tmp_path / "int8").stdout
    assert "weights of linear layers, but not of universal" in described
    assert run("caption", "--checkpoint", tmp_path / "int8", *CLIPS[:2]).stdout == wide.stdout
    refused = run("caption", "--checkpoint", tmp_path / "int8", CLIPS[0], "--dtype", "float32")
    assert refused.exit_code == 2
    assert "cannot be loaded as float32" in refused.stderr
    out = tmp_path / "out.jsonl"
    assert run("caption", *CLIPS[:2], "--out", out, "--dtype", "int8").exit_code == 0
    again = run("caption", *CLIPS[:2], "--out", out)
    assert again.exit_code == 2
    assert "dtype" in again.stderr
