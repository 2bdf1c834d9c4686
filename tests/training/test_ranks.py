"""Two ranks compute what one computes, with whole and with sharded parameters, and resume from each other's saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mplug2_fast.errors import ConfigError
from mplug2_fast.ray import train as train_on_ray
from mplug2_fast.training import Trainer, make_recipe
from tests.local_ray import local_ray
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
        norms = [values.pop("gradient_norm", None) for values in (one, other)]
        assert one == pytest.approx(other, rel=tolerance)
        # Squares of float32 numbers are added up shard by shard, which rounds otherwise: by 6e-7 at the first step,
        # where the gradients are the same.
        assert norms[0] == pytest.approx(norms[1], rel=max(tolerance, 5e-6))


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


MORTAL = """
import os
from pathlib import Path
from tests.training.data import Noise

HERE = Path(__file__).parent

class Mortal(Noise):
    def sample(self, index, rng):
        if os.environ["RANK"] == "1" and (HERE / "run/saves/step-2").exists() and not (HERE / "died").exists():
            (HERE / "died").touch()
            os._exit(1)
        return super().sample(index, rng)
"""


def test_ray_is_checked_before_training(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'mplug2-fast\[ray,train\]'"):
        train_on_ray(recipe(), 2)
    with pytest.raises(ConfigError, match=r"batch_size 4 .* 3 · 1"):
        train_on_ray(recipe(), 3)


@pytest.mark.soak  # Ray starts five processes
@pytest.mark.timeout(900)
def test_workers_of_ray_equal_ranks_although_one_dies(folder, tmp_path):
    (tmp_path / "mortal.py").write_text(MORTAL)
    values = values_of(tmp_path / "run", **RUNS["ddp"])
    values["sources"] = [{**values["sources"][0], "data": f"{tmp_path}/mortal.py:Mortal"}]
    with local_ray():
        with pytest.raises(ConfigError, match="4 workers need one CPU each, and the cluster has 2"):
            train_on_ray(make_recipe(values), 4)
        assert train_on_ray(make_recipe(values), 2) == tmp_path / "run/model"
    assert (tmp_path / "died").exists()
    assert log(tmp_path / "run") == log(folder / "ddp")
