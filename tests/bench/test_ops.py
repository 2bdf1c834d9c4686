"""The benchmark of single operators, at sizes that take no time."""

import contextlib
import dataclasses
import importlib
import json
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from bench import ceilings
from bench import machine as bench_machine
from bench.ops import cli, clock, compiled, measure, table
from mplug2_fast import ops


@pytest.fixture
def small(monkeypatch):
    """The smallest sizes in place of the model's."""
    for function in ops.OPERATORS.values():
        spec = function.op.spec
        monkeypatch.setattr(function.op, "spec", dataclasses.replace(spec, models={"large": spec.awkward[1]}))
    monkeypatch.setattr(measure, "SECONDS", 0.01)


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_every_operator_has_a_row(name, small, native_module):
    row = measure.measure(name, "large", torch.float32, compile=False)
    assert (row.op, row.sizes, row.dtype, row.backend) == (name, "large", "float32", "cpu")
    assert row.milliseconds > 0
    assert row.relative_error < 1e-5
    assert row.x_compiled is None
    assert (row.baseline is None) == (row.x_baseline is None)
    shown = [cell(dataclasses.asdict(row)) for cell in table.COLUMNS.values()]
    assert all(isinstance(text, str) and text for text in shown)


def test_every_operator_has_its_file():
    for name in ops.OPERATORS:
        assert isinstance(importlib.import_module(f"bench.ops.{name}").BASELINES, tuple)


def test_targets_are_judged():
    module = importlib.import_module("bench.ops.local_temporal")
    ratio = {"eager": 3.5, "compiled": 1.1}
    assert list(measure.targets(module, torch.float32, ratio)) == ["≥ 3× eager: met", "≥ 1.2× compiled: missed"]


def test_the_peer_takes_the_operators_arguments(small):
    op = ops.linear_act.op
    given = op.spec.inputs(op.spec.awkward[1])
    peer = compiled.Peer(op.backends["torch"].run, given)
    torch.testing.assert_close(peer(*compiled.inputs(given)), ops.linear_act(**given))


def test_names_that_do_not_exist(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--ops", "softmax"])
    assert "no such choice 'softmax': choose from" in capsys.readouterr().err


@pytest.fixture
def device_log(monkeypatch):
    """What a CUDA device would be asked to do, in order; time on it passes 2 ms an event."""
    log, now = [], iter(range(1000))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, other):
            return 2.0 * (other.at - self.at)

    class Flushed:
        def zero_(self):
            log.append("flush")

    empty = torch.empty
    properties = SimpleNamespace(L2_cache_size=1 << 28)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(
        torch,
        "empty",
        lambda size, dtype, device: Flushed() if size >= 2 << 28 else empty(size, dtype=dtype, device=device),
    )
    return log


def test_on_cuda_a_call_is_timed_between_events_with_a_cold_cache(device_log):
    timer = clock.clock("cuda")
    assert timer(lambda: device_log.append("call")) == pytest.approx(2e-3)
    assert device_log == ["flush", "sleep", "record", "call", "record", "synchronize"]


def test_ceilings_on_cuda_are_timed_between_events(device_log):
    assert ceilings.timed(lambda: device_log.append("call"), "cuda:0") == pytest.approx(2e-3)
    assert device_log == ["record", "call", "record", "synchronize"]


def test_what_is_slow_is_timed_once():
    class Timer(clock.CpuClock):
        slow = 0.5

        def __call__(self, call):
            return call()

    calls = Counter()

    def way(name, seconds):
        def call():
            calls[name] += 1
            return seconds

        return [call]

    seconds = measure.take_turns({"ours": way("ours", 0.1), "eager": way("eager", 0.6)}, Timer())
    assert seconds["eager"] == [0.6]
    assert calls["eager"] == 2
    assert seconds["ours"] == [0.1] * 30


def test_what_cannot_be_measured_is_told_and_the_rest_is_there(small, monkeypatch, tmp_path, capsys, native_module):
    broken = dataclasses.replace(ops.layer_norm.op.backends["cpu"], run=lambda *_: 1 / 0)
    monkeypatch.setattr(ops.layer_norm.op, "_automatic", [broken])
    monkeypatch.setattr(
        ceilings, "measure", lambda *_: {"gemm": {"float32": {"gflops": 1.0, "operator": "x"}}, "copy_gb_per_second": 1}
    )
    target = tmp_path / "ops.json"
    options = ["--ops", "layer_norm,beam_step", "--dtype", "float32", "--no-peer", "--threads", "1"]
    assert cli.main([*options, "--json", str(target)]) == 1
    results = json.loads(target.read_text())
    assert [row["op"] for row in results["rows"]] == ["beam_step"]
    assert results["failed"] == [
        {"op": "layer_norm", "sizes": "large", "dtype": "float32", "error": "ZeroDivisionError: division by zero"}
    ]
    assert "error: layer_norm, large, float32: ZeroDivisionError" in capsys.readouterr().err


def test_a_device_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cli.main(["--ops", "layer_norm", "--device", "cuda"])
    assert "there is no CUDA device 0" in capsys.readouterr().err


def test_the_title_names_the_device():
    machine = {"cpu": "A CPU", "threads": 2, "gpu": "A GPU"}
    assert table.title({"machine": machine, "versions": {"torch": "2"}}) == "operators · A CPU, 2 threads · torch 2"
    results = {"machine": {**machine, "device": "cuda"}, "versions": {"torch": "2"}}
    assert table.title(results) == "operators · A GPU · torch 2"


def test_outside_a_checkout_the_environment_tells_the_commit(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.delenv("MPLUG2_FAST_COMMIT", raising=False)
    assert bench_machine.commit() is None
    monkeypatch.setenv("MPLUG2_FAST_COMMIT", "abc")
    assert bench_machine.commit() == "abc"
