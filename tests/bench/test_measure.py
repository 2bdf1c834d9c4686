"""The level of the model at its smallest: rows, failures, and the choice of workers."""

import dataclasses

import pytest

from bench import measure
from bench.flops import MODEL_TASKS, MPLUG_TASKS, TASKS
from bench.measure import Measured
from bench.plan import FAMILIES, LOADER, TRAIN, Plan
from bench.process import ProcessError
from bench.progress import Progress
from bench.worker import Worker


def plan(**changes):
    sizes = {"frames": 2, "beams": 3, "steps": 3, "batch": 2, "repeats": 1, "threads": 1, "reference_steps": 3}
    given = {"preset": "tiny", "dtypes": ("float32",), "device": "cpu", "tasks": TASKS, "quick": True, **sizes}
    return Plan(**{**given, "baselines": ("reference", "eager"), **changes})


CEILINGS = {
    "gemm": {dtype: {"gflops": 100.0, "operator": "x"} for dtype in ("float32", "bfloat16")},
    "copy_gb_per_second": 10.0,
}


@pytest.fixture(scope="module")
def measured():
    """A run with new processes, whose memory is their own."""
    return measure.run(plan(dtypes=("bfloat16",)), Progress(), CEILINGS)


def test_a_row_for_every_task(measured):
    assert not measured.failed
    assert [row.key.name for row in measured.rows] == list(TASKS)
    for row in measured.rows:
        assert row.key.level == "model"
        assert row.key.sizes == "tiny, 2 frames, 3 beams, 3 steps, batch 2"
        assert row.key.direction == "forward"
        assert list(row.baselines) == ["reference", "eager"]
        assert row.runs == 1
        assert row.spread == 0


def test_figures_are_consistent(measured):
    ceilings = measured.ceilings
    for row in measured.rows:
        for baseline in row.baselines.values():
            assert baseline.ratio == pytest.approx(baseline.seconds / row.seconds)
            assert baseline.peak_memory_bytes > 50e6
        assert row.peak_memory_bytes > row.added_memory_bytes >= 0
        assert row.tflops == pytest.approx(row.flop / row.seconds / 1e12)
        assert row.gb_per_second == pytest.approx(row.bytes / row.seconds / 1e9)
        shares = {
            "compute": 100e3 * row.tflops / ceilings["gemm"][row.key.dtype]["gflops"],
            "memory": 100 * row.gb_per_second / ceilings["copy_gb_per_second"],
        }
        assert row.percent_of_ceiling == pytest.approx(max(shares.values()))
        assert shares[row.bound] == max(shares.values())


def test_results_are_compared(measured):
    for row in measured.rows:
        assert row.correct, row
        assert row.relative_error <= row.allowed_error
        assert 1e-4 < row.relative_error < 0.1
        assert row.baselines["eager"].relative_error is not None
        assert row.baselines["reference"].relative_error is None


def test_no_task_has_the_compiler_in_its_memory(measured):
    for row in measured.rows:
        found = [row.peak_memory_bytes, *(b.peak_memory_bytes for b in row.baselines.values())]
        assert max(found) < min(found) + 60e6


def test_mplug_has_its_own_tasks(forked):
    tasks = tuple(task for task in MPLUG_TASKS if task != "grounding")  # the tiny vocabulary has no places
    found = measure.run(plan(model="mplug", tasks=tasks, frames=1), Progress(), CEILINGS)
    assert not found.failed
    assert [row.key.name for row in found.rows] == list(tasks)
    for row in found.rows:
        assert row.key.sizes == "mPLUG tiny, 1 image, 3 beams, 3 steps, batch 2"
        assert "--model mplug --only" in row.command
        assert list(row.baselines) == ["reference", "eager"]
        assert row.correct
        assert row.relative_error < 1e-4
        assert row.flop
        assert row.bytes


def test_retrieval_of_mplug2(forked):
    found = measure.run(plan(tasks=MODEL_TASKS["mplug2"][-2:]), Progress(), CEILINGS)
    assert not found.failed
    assert [row.key.name for row in found.rows] == ["retrieval features", "re-ranking"]
    for row in found.rows:
        assert list(row.baselines) == ["reference", "eager"]
        assert row.correct
        assert row.relative_error < 1e-4
        assert row.flop
        assert row.bytes


def test_training_steps_and_their_loader(forked):
    found = measure.run(plan(tasks=(*TRAIN[:2], LOADER), batch=1, baselines=("reference",)), Progress(), CEILINGS)
    assert not found.failed
    plain, checkpointed, loader = found.rows
    for step in (plain, checkpointed):
        assert (step.key.level, step.key.direction) == ("train", "both")
        assert step.key.sizes == "tiny, 2 frames, 3 targets"
        assert list(step.baselines) == ["reference"]
        assert step.correct
        assert 0 < step.relative_error < 1e-4
        assert step.tokens > 3
    assert plain.recomputed_flop is None
    assert 0.1 < checkpointed.recomputed_flop / checkpointed.flop < 0.34
    assert loader.flop is None
    assert list(loader.baselines) == ["captioning step"]
    assert any("bounds training with one such process" in note for note in found.notes)


def test_wrong_results_are_marked():
    ours = Measured("native", [1.0, 1.2, 1.1], 9, 4, 0.04)
    others = {"reference": Measured("eager", [9.0]), "eager": Measured("eager", [2.0, 3.6, 2.2], 7, 3, 0.01)}
    ceilings = {"gemm": {"bfloat16": {"gflops": 1.0}}, "copy_gb_per_second": 1.0}
    row = measure.row(plan(), "features", "bfloat16", ours, others, ceilings)
    assert row.baselines["eager"].ratio == pytest.approx(2.0)
    assert row.baselines["reference"].ratio == pytest.approx(9 / 1.1)
    assert not row.correct
    row = measure.row(plan(), "features", "bfloat16", dataclasses.replace(ours, relative_error=0.015), others, ceilings)
    assert row.correct
    row = measure.row(
        plan(), "features", "bfloat16", dataclasses.replace(ours, relative_error=float("inf")), {}, ceilings
    )
    assert not row.correct


def test_results_of_a_reference_at_fewer_steps_are_not_compared(forked):
    found = measure.run(
        plan(tasks=("captioning", "features"), reference_steps=2, baselines=("reference",)), Progress(), CEILINGS
    )
    captioning, features = found.rows
    assert (captioning.relative_error, captioning.allowed_error, captioning.correct) == (None, None, True)
    assert features.relative_error < 1e-5
    assert any("at 2 of 3 steps: captioning. Ratios to it are lower bounds" in note for note in found.notes)
    assert "--reference-steps 2" in captioning.command


def kinds(found):
    return [(spec.implementation, spec.dtype) for spec in found]


def test_workers():
    chosen = {"tasks": (*TASKS, *TRAIN), "dtypes": ("float32", "bfloat16")}
    everything = plan(**chosen, baselines=("reference", "eager", "compiled"))
    assert kinds(everything.specs("captioning", everything.dtypes, ""))[:5] == [
        *(("reference", "float32"), ("fast", "float32"), ("eager", "float32"), ("frozen", "float32")),
        ("fast", "bfloat16"),
    ]
    # Gradients do not go through frozen weights.
    assert ("compiled", "float32") in kinds(everything.specs("captioning step", ("float32",), ""))
    some = dataclasses.replace(everything, compiled_tasks=("captioning",))
    assert ("frozen", "float32") not in kinds(some.specs("answering", ("float32",), ""))
    assert some.tasks_of("frozen", "captioning") == ("captioning",)
    assert some.tasks_of("eager", "captioning") == tuple(task for task in TASKS if task in FAMILIES["captioning"])


def test_memory_decides_which_workers_run_together():
    both = ("float32", "bfloat16")
    large = plan(preset="large", frames=16, steps=15, batch=1, dtypes=both, tasks=("captioning",))
    assert large.groups(32 << 30) == [("captioning", both)]
    assert large.groups(12 << 30) == [("captioning", ("float32",)), ("captioning", ("bfloat16",))]
    all_tasks = dataclasses.replace(large, tasks=(*TASKS, *TRAIN))
    served = [family for family in FAMILIES if family != "retrieval"]
    assert [family for family, _ in all_tasks.groups(1 << 50)] == served
    sizes = [all_tasks.resident_bytes(family, both) for family in served]
    assert sizes == sorted(sizes)


def test_training_is_left_out_if_memory_cannot_hold_it():
    large = plan(preset="large", frames=16, steps=15, batch=1, tasks=("captioning", "captioning step"))
    notes = []
    assert measure.fitting(large, 20 << 30, notes) == [("captioning", ("float32",))]
    assert notes == [
        "No captioning step in float32: with all baselines it needs about 50 GB of memory, and 21 GB are free. Use "
        "fewer --frames or --baselines, or a smaller --preset."
    ]


class Broken:
    """A process whose implementation `broken` fails in its second run."""

    def __init__(self, label, make, spec):
        self.label, self.spec, self.runs = label, spec, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def close(self):
        pass

    def ready(self):
        return self

    def call(self, function, *_):
        if function is Worker.describe:
            return "native", ["something"] if self.runs else []
        self.runs += function is Worker.run
        if self.spec.implementation == self.broken and self.runs > 1:
            raise ProcessError(f"{self.label}: out of memory")
        return {"seconds": 1.0, "peak_memory_bytes": 2, "added_memory_bytes": 1, "relative_error": 0.0}


@pytest.mark.parametrize("broken", ["eager", "fast", "reference"])
def test_a_worker_that_fails_is_left_out(broken, monkeypatch):
    monkeypatch.setattr(Broken, "broken", broken, raising=False)
    monkeypatch.setattr(measure, "Process", Broken)
    asked = plan(tasks=("captioning", "features"), dtypes=("float32", "bfloat16"), repeats=2)
    found = measure.run(asked, Progress(), CEILINGS)
    why = f"{broken} float32: out of memory"
    if broken == "eager":
        assert len(found.rows) == 4
        assert all(list(row.baselines) == ["reference"] for row in found.rows)
        assert sum(why in note for note in found.notes) == 1
        assert "fast bfloat16, captioning: something." in found.notes
        assert not found.failed
    else:
        assert not found.rows
        keys = [asked.key(task, dtype) for task in asked.tasks for dtype in asked.dtypes]
        assert found.failed.keys() == {key.full for key in keys}
        assert found.failed[keys[0].full] == why
