"""Rows from cases, each in its own process."""

from dataclasses import replace

import pytest

from bench import ceilings, runner
from bench.clock import Budget
from bench.ops import cases
from bench.progress import Progress
from bench.row import Key, Results, Selection
from mplug2_fast import ops

CEILINGS = {"gemm": {"float32": {"gflops": 100.0, "operator": "x"}}, "copy_gb_per_second": 10.0}
SETTINGS = runner.Settings(1, compiled=frozenset(), budget=Budget(0.01, most=20))


def small(*names):
    """The smallest keys of these operators."""
    found = []
    for name in names:
        sizes = f"edge, {cases.described(ops.OPERATORS[name].op.spec.edge_cases[1])}"
        found.append(Key("ops", name, sizes, "forward", "float32", "cpu"))
    return found


def test_a_row_of_a_case_in_its_own_process(tmp_path, native_module):
    key = small("layer_norm")[0]
    row = runner.row(key, *runner.measure(key, SETTINGS), CEILINGS, SETTINGS)
    assert (row.key, row.backend, row.correct) == (key, "cpu", True)
    assert row.seconds > 0
    assert row.runs >= 5
    assert row.percent_of_ceiling > 0
    assert list(row.baselines)[:3] == ["reference", "eager", "torch"]
    assert row.ratio("reference") == row.ratio("eager")
    assert row.peak_memory_bytes is None or row.peak_memory_bytes > row.added_memory_bytes >= 0
    results = Results({"cpu": "A"}, {"torch": "2"}, CEILINGS, [row])
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results


def test_the_command_measures_the_same_row():
    for key in cases.keys(Selection("large", ("bfloat16",), directions=("backward",), sizes=("large",))):
        words = runner.command(key, SETTINGS, ("eager",)).split()
        option = dict(zip(words[2::2], words[3::2], strict=False))
        selection = Selection(
            "large",
            (option["--dtype"],),
            directions=(option["--direction"],),
            sizes=(option["--sizes"],),
            only=(option["--only"],),
        )
        assert key in cases.keys(selection)


def test_a_case_that_fails_is_reported_and_the_others_have_rows(native_module):
    keys = [Key("ops", "layer_norm", "enormous", "forward", "float32", "cpu"), *small("beam_step")]
    results = runner.run(keys, SETTINGS, Progress(), CEILINGS)
    assert [row.key.name for row in results.rows] == ["beam_step"]
    assert results.failed == {"ops · layer_norm · enormous · float32": "the case: KeyError: 'enormous'"}


def test_a_wrong_result_makes_a_wrong_row(monkeypatch):
    right = cases._result
    monkeypatch.setattr(cases, "_result", lambda op, arguments: right(op, arguments) * 1.001)
    settings = replace(SETTINGS, memory=False, apart=False)
    row = runner.run(small("layer_norm"), settings, Progress(), CEILINGS).rows[0]
    assert not row.correct
    assert row.relative_error > row.allowed_error


def test_the_binding_ceiling():
    assert ceilings.place(10**9, 10**6, 0.02, "float32", CEILINGS) == (0.05, 0.05, 50.0, "compute")
    assert ceilings.place(10**6, 10**9, 0.2, "float32", CEILINGS) == (5e-6, 5.0, 50.0, "memory")
    assert ceilings.place(None, None, 1.0, "float32", CEILINGS) == (None, None, None, None)
    assert ceilings.place(10**9, None, 1.0, "float16", CEILINGS)[2:] == (None, None)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"rows": [{"op": "layer_norm"}]}')
    with pytest.raises(ValueError, match="not results of this benchmark"):
        Results.read(path)
