"""Comparing two runs, and the gate, on a simulated noisy machine and on a slowed operator."""

import dataclasses
import io
import math
import random
import statistics

import pytest
from rich.console import Console

from bench import compare
from bench.row import Baseline, Key, Results, Row

KEY = Key("ops", "layer_norm", "base", "forward", "float32", "cpu")
BASELINES = ("reference", "eager", "torch", "compiled")


def row(ratios, key=KEY, *, seconds=1.0, correct=True):
    baselines = {name: Baseline(seconds * ratio, ratio) for name, ratio in ratios.items()}
    return Row(
        key,
        seconds,
        spread=0.0,
        runs=1,
        flop=None,
        bytes=None,
        tflops=None,
        gb_per_second=None,
        percent_of_ceiling=None,
        bound=None,
        baselines=baselines,
        peak_memory_bytes=None,
        added_memory_bytes=None,
        relative_error=0.5,
        allowed_error=0.25,
        correct=correct,
        backend="cpu",
        command="",
    )


def results(*rows, machine=(), torch_version="2", **others):
    return Results({"cpu": "A", "threads": 2, **dict(machine)}, {"torch": torch_version}, {}, list(rows), **others)


def change(old, new):
    return compare.Change(row(old), row(new))


def never(key):
    raise AssertionError(f"{key} was measured again")


# --- ratios


def test_only_ratios_are_judged():
    slow_machine = compare.Change(row({"eager": 2.0}, seconds=1.0), row({"eager": 2.0}, seconds=9.0))
    assert slow_machine.verdict(0.1) == "same"
    assert change({"eager": 2.0}, {"eager": 1.6}).time == pytest.approx(0.25)
    assert change({"eager": 2.0}, {"eager": 1.6}).verdict(0.1) == "slower"
    assert change({"eager": 2.0}, {"eager": 1.6}).verdict(0.3) == "same"
    assert change({"eager": 2.0}, {"eager": 2.5}).verdict(0.1) == "faster"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_slower_baseline_does_not_hide_our_loss(count):
    old = dict.fromkeys(BASELINES[:count], 2.0)
    new = {name: ratio / 1.25 for name, ratio in old.items()} | {"reference": 2.0 * 1.5 / 1.25}
    assert change(old, new).verdict(0.1) == "slower"


def test_one_measurement_under_two_names_votes_once():
    old = row({"reference": 2.0, "eager": 2.0, "torch": 2.0})
    new = row({"reference": 1.2, "eager": 1.2, "torch": 2.0})
    assert compare.Change(old, new).verdict(0.1) == "same"


def test_only_common_baselines_are_compared():
    both = change({"eager": 2.0, "torch": 1.0}, {"eager": 2.0, "compiled": 1.0})
    assert both.ratios == {"eager": (2.0, 2.0)}
    assert change({"eager": 2.0}, {"torch": 2.0}).verdict(0.1) == "not judged"
    assert change({"eager": 2.0}, {"eager": math.nan}).verdict(0.1) == "not judged"


# --- two runs


def test_rows_of_only_one_run():
    other, third = (dataclasses.replace(KEY, name=name) for name in ("mlp", "attention"))
    found = compare.compare(
        results(row({"eager": 1.0}), row({"eager": 1.0}, other)),
        results(row({"eager": 1.0}), row({"eager": 1.0}, third)),
    )
    assert ([change.key for change in found.changes], found.gone, found.added) == ([KEY], [other], [third])
    assert compare.regressions(found, 0.1) == []


def test_runs_without_a_common_row():
    other = dataclasses.replace(KEY, name="mlp")
    with pytest.raises(ValueError, match=r"share no row .layer_norm · base · float32 before, mlp · base · float32 now"):
        compare.compare(results(row({})), results(row({}, other)))
    with pytest.raises(ValueError, match="none now"):
        compare.compare(results(row({})), results())


def test_a_wrong_result_is_a_regression():
    found = compare.compare(results(row({"eager": 1.0})), results(row({"eager": 9.0}, correct=False)))
    (wrong,) = compare.regressions(found, 0.1)
    assert str(wrong) == ("layer_norm · base · float32: became wrong: error 5.0e-01, allowed 2.5e-01")
    back = compare.compare(results(row({"eager": 9.0}, correct=False)), results(row({"eager": 1.0})))
    assert back.changes[0].verdict(0.1) == "correct again"


def test_a_failed_row_is_a_regression():
    new = results(failed={"ops · layer_norm · base · float32": "it died"})
    (failed,) = compare.regressions(compare.compare(results(row({"eager": 1.0})), new), 0.1)
    assert failed.why == "could not be measured: it died"


def test_differing_machines_and_versions_are_noted():
    old, new = results(row({"eager": 1.0})), results(row({"eager": 1.0}), machine={"threads": 1}, torch_version="3")
    assert compare.compare(old, new).notes == [
        "ratios may differ because of another machine: threads was 2 and is 1",
        "ratios may differ because of another version: torch was 2 and is 3",
    ]
    assert compare.compare(old, old).notes == []


@pytest.mark.parametrize(("text", "limit"), [("10%", 0.1), ("0.1", 0.1), (" 2.5 %", 0.025), ("99%", 0.99)])
def test_limits(text, limit):
    assert compare.parse_limit(text) == pytest.approx(limit)


@pytest.mark.parametrize(
    "text", ["", "%", "10", "0", "0%", "100%", "1", "-5%", "ten", "10%%", "10% of it", "nan", "inf"]
)
def test_invalid_limits(text):
    with pytest.raises(ValueError, match=r"not a share between 0 and 1: write 10% or 0.1"):
        compare.parse_limit(text)


def test_the_table():
    mlp, gone = (dataclasses.replace(KEY, name=name) for name in ("mlp", "gone"))
    old = results(row({"eager": 2.0, "torch": 1.5}, seconds=0.001), row({}, mlp), row({}, gone))
    new = results(row({"eager": 1.0, "torch": 0.75}, seconds=0.002), row({}, mlp))
    console = Console(width=120, file=io.StringIO())
    compare.show(compare.compare(old, new), 0.1, console)
    shown = console.file.getvalue()
    for text in ("eager 2× → 1×", "torch 1.5× → 0.75×", "+100%", "1 → 2", "slower", "not judged"):
        assert text in shown
    assert "only in the earlier run: gone · base · float32" in shown


# --- the gate


def passed(found, limit=0.1):
    return not compare.regressions(found, limit)


def test_a_row_that_is_not_slower_is_not_measured_again():
    run = results(row({"eager": 2.0}))
    assert passed(compare.gate(run, run, 0.1, never))


def test_one_faster_measurement_passes():
    measured = iter([row({"eager": 1.0}), row({"eager": 2.0})])
    found = compare.gate(results(row({"eager": 2.0})), results(row({"eager": 1.0})), 0.1, lambda key: next(measured))
    assert passed(found)
    assert found.again == {KEY: [1.0, 1.0, 0.0]}
    assert found.notes == ["measured again: layer_norm · base · float32: +100%, then +100%, then +0% of time: same"]
    assert found.changes[0].new.ratio("eager") == 2.0


def test_a_row_that_is_always_slower_fails():
    asked = []

    def again(key):
        asked.append(key)
        return row({"eager": 1.0})

    found = compare.gate(results(row({"eager": 2.0})), results(row({"eager": 1.0})), 0.1, again, attempts=4)
    assert asked == [KEY] * 3
    assert [str(each) for each in compare.regressions(found, 0.1)] == [
        "layer_norm · base · float32: takes +100% of time: eager 2× → 1×"
    ]


def test_a_wrong_row_is_not_measured_again():
    found = compare.gate(results(row({"eager": 2.0})), results(row({"eager": 2.0}, correct=False)), 0.1, never)
    assert not passed(found)


def test_a_row_that_becomes_wrong_when_measured_again():
    old, new = results(row({"eager": 2.0})), results(row({"eager": 1.0}))
    found = compare.gate(old, new, 0.1, lambda key: row({"eager": 2.0}, correct=False))
    assert compare.regressions(found, 0.1)[0].why.startswith("became wrong")


def test_a_row_that_cannot_be_measured_again_is_a_regression():
    found = compare.gate(results(row({"eager": 2.0})), results(row({"eager": 1.0})), 0.1, never)
    assert compare.regressions(found, 0.1)[0].why.startswith("could not be measured: AssertionError: ")
    assert found.notes == ["measured again: layer_norm · base · float32: +100% of time: failed"]


def test_a_gate_that_can_judge_nothing_does_not_pass():
    with pytest.raises(ValueError, match="no row can be judged"):
        compare.gate(results(row({"eager": 1.0})), results(row({"torch": 1.0})), 0.1, never)


def test_rows_without_a_verdict_are_noted():
    other = dataclasses.replace(KEY, name="mlp")
    old, new = results(row({"eager": 1.0}), row({}, other)), results(row({"eager": 1.0}), row({}, other))
    found = compare.gate(old, new, 0.1, never)
    assert found.notes == ["not judged: mlp · base · float32: the runs share no baseline of it"]


# --- a noisy machine


class NoisyMachine:
    """Every turn all ways drift together by up to 30% and each is off by 3% on its own; in one of five measurements a
    baseline is 40% slower or faster."""

    def __init__(self, seed, baselines=4):
        self.random = random.Random(seed)
        self.baselines = dict(zip(BASELINES[:baselines], (8.0, 3.0, 1.5, 1.2), strict=False))
        self.slowed = 1.0

    def measure(self, key):
        seconds = {**self.baselines, "ours": self.slowed}
        if self.random.random() < 0.2:
            seconds[self.random.choice(list(self.baselines))] *= self.random.choice([1.4, 1 / 1.4])
        ratios = {name: [] for name in self.baselines}
        for _ in range(9):
            drift = self.random.uniform(1.0, 1.3)
            turn = {name: drift * value * self.random.lognormvariate(0, 0.03) for name, value in seconds.items()}
            for name in ratios:
                ratios[name].append(turn[name] / turn["ours"])
        return row({name: statistics.median(each) for name, each in ratios.items()}, key)

    def passes(self, old):
        """Whether the gate passes."""
        return passed(compare.gate(old, results(self.measure(KEY)), 0.1, self.measure))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("baselines", [2, 3, 4])
def test_unchanged_rows_pass_ten_times_on_a_noisy_machine(seed, baselines):
    machine = NoisyMachine(seed, baselines)
    old = results(machine.measure(KEY))
    assert all(machine.passes(old) for _ in range(10))


@pytest.mark.parametrize("seed", range(10))
def test_slower_rows_fail_ten_times_on_a_noisy_machine(seed):
    machine = NoisyMachine(seed)
    old = results(machine.measure(KEY))
    machine.slowed = 1.25
    assert not any(machine.passes(old) for _ in range(10))


# --- an operator that is slowed down
