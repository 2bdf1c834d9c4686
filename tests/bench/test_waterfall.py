"""The waterfall at its smallest: all rows compute the same function."""

import json
import math
import shlex
import sys
from contextlib import contextmanager

import pytest
import torch

from bench import waterfall
from bench.measure import SCORE_NOISE
from bench.plan import Plan, Spec
from bench.progress import Progress
from bench.waterfall_steps import Sizes, StepWorker, techniques
from mplug2_fast import _native, ops
from mplug2_fast._native import native

pytestmark = pytest.mark.filterwarnings("ignore:mplug2_fast runs on its PyTorch fallbacks")

PLAN = Plan(
    preset="tiny",
    dtypes=("float32",),
    device="cpu",
    tasks=("captioning",),
    frames=2,
    beams=2,
    steps=3,
    batch=1,
    repeats=2,
    threads=1,
    reference_steps=3,
)


@contextmanager
def native_restored():
    """Restores the native module, which one technique hides."""
    with pytest.MonkeyPatch.context() as patch:
        if native() is not None:
            patch.setitem(sys.modules, "mplug2_fast._C", native())
        yield
    _native._load.cache_clear()


@pytest.fixture(scope="module")
def first_and_last(forked):
    """A run of three rows, each in its process."""
    steps = waterfall.steps_of(PLAN)
    chosen = {name: steps[name] for name in (next(iter(steps)), *list(steps)[-2:])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waterfall, "steps_of", lambda plan: chosen)
        return waterfall.run(PLAN, Progress())


@pytest.fixture(scope="module")
def replies(tmp_path_factory):
    """The replies of all rows, computed in this process."""
    folder = tmp_path_factory.mktemp("exchange")
    torch.save(torch.randn(1, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0)), folder / "video.pt")
    found = {}
    for name, (technique, dtype) in waterfall.steps_of(PLAN).items():
        with native_restored():
            spec = Spec("waterfall", dtype, "cpu", 1, PLAN.config, 2, 3, str(folder))
            found[name] = [StepWorker(spec, technique).run()]
    return found


def test_all_rows_find_the_same_caption(replies):
    rows = waterfall.tabulate(waterfall.steps_of(PLAN), replies)
    assert [row.technique for row in rows] == [*techniques("cpu"), "bfloat16"]
    assert [row.dtype for row in rows] == ["float32"] * (len(rows) - 1) + ["bfloat16"]
    for row in rows[:-1]:
        assert row.same_caption, row
        assert row.relative_error < 1e-5, row
    # Rounding is small unless it makes another beam the best.
    assert rows[-1].relative_error < SCORE_NOISE or not rows[-1].same_caption
    assert rows[-1].relative_error > 0
    assert rows[0].relative_error == 0


def test_a_run(first_and_last):
    rows = first_and_last["rows"]
    assert len(rows) == 3
    for row in rows:
        assert row["seconds"] > 0
        assert row["runs"] == 2 or (row["runs"] == 1 and row["seconds"] > waterfall.SLOW_SECONDS)
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 50e6
    assert (rows[0]["x_released"], rows[0]["x_previous"]) == (1, None)
    assert rows[1]["x_released"] == rows[1]["x_previous"]
    assert rows[1]["same_caption"]


def test_json_table_and_markdown(first_and_last, capsys):
    assert json.loads(json.dumps(first_and_last)) == first_and_last
    assert {"machine", "versions", "command", "rows"} <= first_and_last.keys()
    assert shlex.split(first_and_last["command"])[:3] == ["python", "bench/run.py", "--waterfall"]
    waterfall.show(first_and_last)
    shown = capsys.readouterr().out
    text = waterfall.markdown(first_and_last)
    for row in first_and_last["rows"]:
        assert row["technique"] in shown
        assert row["technique"] in text
    assert "| + bfloat16 | bfloat16 |" in text
    assert "| official algorithm | float32 |" in text


@pytest.mark.skipif(native() is None, reason="there is no native module to hide")
def test_products_without_own_kernels():
    make = next(make for name, make in techniques("cpu").items() if "oneDNN" in name)
    x = torch.zeros(2, 8)
    with native_restored():
        make(Sizes(PLAN.config, torch.float32, "cpu", 2, 3))
        assert ops.explain(ops.layer_norm, x).chosen == "torch"
        assert ops.explain(ops.linear_act, x, torch.zeros(8, 8)).chosen == "cpu"
    assert ops.explain(ops.layer_norm, x).chosen == "cpu"


def runs(*seconds, caption=(1, 2), score=-1.0):
    return [
        {"seconds": value, "peak_memory_bytes": None, "captions": [list(caption)], "scores": [score]}
        for value in seconds
    ]


def test_ratios_compare_turns():
    steps = {name: (name, "float32") for name in "abc"}
    replies = {"a": runs(40.0), "b": runs(4.0, 8.0, 6.0), "c": runs(2.0, 2.0, 6.0, caption=(1, 3), score=-1.5)}
    a, b, c = waterfall.tabulate(steps, replies)
    assert (a.seconds, b.seconds, c.seconds) == (40, 6, 2)
    assert b.x_previous == pytest.approx(40 / 6)
    assert c.x_previous == 2.0  # the median of 2, 4 and 1
    assert c.x_released == 20
    assert (b.same_caption, c.same_caption) == (True, False)
    assert c.relative_error == pytest.approx(0.5)
    assert a.peak_memory_bytes is None


def test_wrong_rows_are_marked(first_and_last):
    assert waterfall.wrong(first_and_last) == []
    rows = [
        {**row, "relative_error": error}
        for row, error in zip(first_and_last["rows"], (0.0, math.nan, 0.3), strict=True)
    ]
    changed = {**first_and_last, "rows": rows}
    assert waterfall.wrong(changed) == [rows[1]["technique"]]
    assert waterfall.markdown(changed).count("WRONG") == 1
