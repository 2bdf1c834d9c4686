"""A run that is stopped at any moment resumes as if nothing had happened."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
import torch

from mplug2_fast.errors import ConfigError, DataError, MPlug2Error
from mplug2_fast.training import Trainer
from mplug2_fast.training import saves as saves_module
from mplug2_fast.training.saves import OptimizerState
from mplug2_fast.training.state import State
from tests.training.data import Noise

EVERYTHING = {"ema": 0.9, "distillation": {"alpha": 0.3}, "accumulate": 2}


def weights(trainer):
    optimizer = OptimizerState(trainer.optimizer, trainer._parameter_names)
    return {name: tensor.clone() for name, tensor in {**trainer._weights(), **optimizer.tensors}.items()}


def log(trainer):
    return [json.loads(line) for line in (trainer.folder / "log.jsonl").read_text().splitlines()]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class StoppedError(Exception):
    pass


def stop_before(monkeypatch, step):
    """Raise in the run before this step, as a kill would end it: without a save."""
    original = Trainer.step

    def steps(self, shares):
        if self.state.step == step:
            raise StoppedError
        return original(self, shares)

    monkeypatch.setattr(Trainer, "step", steps)


def test_a_stopped_run_resumes_exactly(recipe, train, monkeypatch, tmp_path):
    whole, _ = train(recipe(**EVERYTHING, out=str(tmp_path / "whole")))
    plan = recipe(**EVERYTHING)
    for step in (1, 3, 5):
        with monkeypatch.context() as patched:
            stop_before(patched, step)
            with pytest.raises(StoppedError):
                train(plan)
    resumed, lines = train(plan)
    assert "resuming after step 4 of 6" in lines
    assert_same(weights(resumed), weights(whole))
    assert log(resumed) == log(whole)
    finished, lines = train(plan)
    assert "resuming after step 6 of 6" in lines
    assert_same(weights(finished), weights(whole))


def test_damaged_saves_and_full_disks(recipe, train, monkeypatch):
    plan = recipe(keep=2)
    first, _ = train(plan)
    folder = first.folder / "saves"
    assert sorted(path.name for path in folder.iterdir()) == ["step-4", "step-6"]
    shard = next((folder / "step-6").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    original = saves_module.dcp.save

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saves_module.dcp, "save", full)
    again, lines = train(plan)
    assert any("step-6: damaged" in line and "going back to the save before" in line for line in lines)
    assert any("No space left on device; the save of step 6 stays" in line for line in lines)
    monkeypatch.setattr(saves_module.dcp, "save", original)
    assert_same(weights(again), weights(first))
    assert not list(folder.glob(".*"))


def test_sigterm_saves_and_stops(recipe, train, monkeypatch):
    original = Trainer.step

    def step(self, shares):
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, shares)

    plan = recipe()
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", step)
        with pytest.raises(SystemExit) as stopped:
            train(plan)
    assert stopped.value.code == 143
    _, lines = train(plan)
    assert "resuming after step 4 of 6" in lines


def test_another_recipe_is_refused(recipe, train):
    train(recipe(steps=2))
    with pytest.raises(ConfigError, match=r"was started with another optimizer.learning_rate: use the original"):
        train(recipe(steps=2, optimizer={"learning_rate": 0.1, "vision_learning_rate": 5e-4}))


def test_workers_and_parts_do_not_change_the_result(recipe, train, tmp_path):
    """Parts are weighted by their targets: captions of different lengths count as in one batch."""
    one, _ = train(recipe(steps=3, out=str(tmp_path / "a")))
    workers, _ = train(recipe(steps=3, out=str(tmp_path / "b"), workers=2))
    assert_same(weights(workers), weights(one))
    for name, change in {"c": {"accumulate": 4}, "d": {"activation_checkpointing": True}}.items():
        other, _ = train(recipe(steps=3, out=str(tmp_path / name), **change))
        for found, expected in zip(log(other), log(one), strict=True):
            assert found == pytest.approx(expected, rel=1e-4)


def test_unreadable_files(recipe, train, monkeypatch):
    monkeypatch.setattr(Noise, "unreadable", frozenset({3}))
    trainer, lines = train(recipe(max_bad=0.1, save_every=9))
    assert trainer.state.bad == {"3.mp4": "damaged"}
    assert lines.count("skipped an unreadable file: 3.mp4: damaged") == 1
    monkeypatch.setattr(Noise, "unreadable", frozenset({3, 4}))
    with pytest.raises(DataError, match=r"2 of 11 files cannot be read, more than max_bad 0.1; first"):
        train(recipe(max_bad=0.1, out=str(trainer.folder / "other"), log_every=3))


def test_steps_that_are_not_finite_are_skipped(recipe, train, monkeypatch):
    from mplug2_fast.tasks import TASKS

    task = TASKS["captioning"]
    original, calls = type(task).loss, []

    def loss(self, model, batch, **options):
        calls.append(1)
        value = original(self, model, batch, **options)
        return value * float("nan") if len(calls) in (3, 4) else value

    monkeypatch.setattr(type(task), "loss", loss)
    trainer, lines = train(recipe())
    assert (trainer.state.skipped, trainer.state.skipped_in_row) == (2, 0)
    assert any(line.startswith("step 3: skipped: the loss is nan") for line in lines)
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    calls.clear()
    with pytest.raises(MPlug2Error, match="2 steps in a row were skipped"):
        train(recipe(max_skipped=1, out=str(trainer.folder / "other")))


def test_a_spike_is_skipped():
    state = State(step=100, mean=2.0, variance=0.01)
    assert "standard deviations" in state.reason_to_skip(5.0, 1.0, max_spike=10)
    assert state.mean == 2.0
    assert state.reason_to_skip(5.0, 1.0, max_spike=0) is None
    assert state.reason_to_skip(2.5, 1.0, max_spike=10) is None
    assert State(step=1, mean=2.0).reason_to_skip(50.0, 1.0, max_spike=10) is None


def test_two_runs_in_one_folder(recipe, train, monkeypatch):
    original = Trainer.step

    def step(self, shares):
        if self.state.step == 1 and not refused:
            with pytest.raises(ConfigError, match="another run is training there") as error:
                train(recipe())
            refused.append(error)
        return original(self, shares)

    refused = []
    monkeypatch.setattr(Trainer, "step", step)
    train(recipe())
    assert refused
