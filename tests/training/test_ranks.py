"""Two ranks compute what one computes, with whole and with sharded parameters, and resume from each other's saves."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from mplug2_fast.training import Trainer, make_recipe
from tests.training.conftest import values_of
from tests.training.ranks import RUNS, launcher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [*launcher(), "tests.training.ranks", str(folder), "ddp", "fsdp", "mixed"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def on_one_rank(folder, name):
    Trainer(make_recipe(values_of(folder, **RUNS[name])), note=lambda line: None).train()


def assert_close(found, expected, tolerance):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=tolerance)


def test_two_ranks_equal_one(folder, tmp_path):
    on_one_rank(tmp_path / "one", "ddp")
    assert_close(log(folder / "ddp"), log(tmp_path / "one"), 1e-5)
    on_one_rank(tmp_path / "mixed", "mixed")
    assert_close(log(folder / "mixed"), log(tmp_path / "mixed"), 1e-5)


def test_sharded_parameters_equal_whole_ones(folder):
    assert_close(log(folder / "fsdp"), log(folder / "ddp"), 1e-6)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_rank_resumes_from_two(folder, name):
    before = log(folder / name)
    save = folder / name / "saves" / "step-4"
    save.rename(folder / name / "save-4")  # resume from step 2
    on_one_rank(folder / name, name)
    assert_close(log(folder / name), before, 1e-5)
