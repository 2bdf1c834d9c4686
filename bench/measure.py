"""The level of the model: worker processes side by side take turns, and the medians of their runs become rows."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import ceilings as under
from bench import inputs, loader, machine
from bench.case import OURS
from bench.clock import Turns
from bench.flops import STEPS
from bench.plan import COMPARED, DECODING, LOADER, QUESTION_TOKENS, TEXT_TOKENS, Plan, Spec
from bench.process import Process, ProcessError
from bench.progress import Progress
from bench.row import EIGHT_BIT, Baseline, Results, Row
from bench.worker import Worker
from mplug2_fast.info import available_memory
from mplug2_fast.models.config import SEP_TOKEN_ID

SLOW_SECONDS = 5.0
"""A reference that is slower is neither warmed up nor repeated: its first run counts."""
WARM_UPS = {"cuda": 3}
"""On a GPU a first run tunes and compiles, and a second one captures graphs."""
BEFORE = {
    "universal": ("vision",),
    "decode": ("vision", "universal"),
    "re-ranking": ("features", "text states"),
    "re-ranking long texts": ("features", "long text states"),
}
"""The tasks that the reference computes first to give a task its input."""
NOISE, SCORE_NOISE = 1e-5, 4e-2
"""Relative errors; see NOTES.md. In a narrow dtype a search may choose other words, which changes the score by that
much in any dtype."""


@dataclass
class Measured:
    """The runs of one task by one worker."""

    backend: str
    seconds: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    added_memory_bytes: int | None = None
    relative_error: float | None = None

    def warm_up(self, reply: dict[str, Any]) -> None:
        """Counts a run that is not timed. A process keeps memory, so a later run may add less than the first."""
        if reply["added_memory_bytes"] is not None:
            self.added_memory_bytes = max(self.added_memory_bytes or 0, reply["added_memory_bytes"])
        if reply["relative_error"] is not None:
            self.relative_error = reply["relative_error"]

    def add(self, reply: dict[str, Any]) -> None:
        self.warm_up(reply)
        self.seconds.append(reply["seconds"])
        if reply["peak_memory_bytes"] is not None:
            self.peak_memory_bytes = max(self.peak_memory_bytes or 0, reply["peak_memory_bytes"])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def run(plan: Plan, progress: Progress, ceilings: dict[str, Any]) -> Results:
    """All rows of the plan. Rows that could not be measured are in `failed`, missing baselines in the notes.

    Args:
        ceilings: from `bench.ceilings.measure`.
    """
    described, versions = machine.describe()
    described |= {"threads": plan.threads, "device": plan.device}
    results = Results(described, versions, ceilings)
    with tempfile.TemporaryDirectory() as exchange:
        results.notes += [f"Input: {save_inputs(plan, Path(exchange))}.", *notes(plan)]
        groups = fitting(plan, available_memory(), results.notes)
        measured = [Group(plan, *group, exchange, progress, results) for group in groups]
        # All workers of a model this small start while the first compile.
        for alive in [measured] if plan.preset == "tiny" else [[group] for group in measured]:
            measure(alive)
    for group in measured:
        results.rows += tabulate(plan, group.family, group.runs, results.ceilings)
    order = [plan.key(task, dtype) for task in plan.tasks for dtype in plan.dtypes]
    results.rows.sort(key=lambda row: order.index(row.key))
    results.notes += of_loader(results.rows, plan.batch)
    return results


def fitting(plan: Plan, available: int, notes: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The plan's groups, without training if memory cannot hold it: the system would kill any of the processes."""
    groups = []
    for family, dtypes in plan.groups(available):
        needed = plan.resident_bytes(family, dtypes)
        if family in STEPS and plan.device == "cpu" and needed > available:
            notes.append(
                f"No {family} in {', '.join(dtypes)}: with all baselines it needs about {needed / 1e9:.0f} GB of "
                f"memory, and {available / 1e9:.0f} GB are free. "
                "Use fewer --frames or --baselines, or a smaller --preset."
            )
        else:
            groups.append((family, dtypes))
    if len(groups) > len({family for family, _ in groups}):
        notes.append("All workers together do not fit into memory, so the dtypes were measured one after another.")
    return groups


def save_inputs(plan: Plan, exchange: Path) -> str:
    """Writes the inputs of the workers. Returns a description of the video."""
    config = plan.config
    description = plan.save_video(exchange)
    caption = 1 + config.generation.prompt_tokens + plan.steps
    tokens = {"question": QUESTION_TOKENS, "caption": caption, "answer": 1 + plan.steps}
    texts = {name: inputs.lengths(longest, plan.batch) for name, longest in tokens.items()}
    for seed, (name, lengths) in enumerate({**texts, **COMPARED}.items()):
        width = TEXT_TOKENS if name == "texts" else None
        last = SEP_TOKEN_ID if name == "candidates" else None
        ids, mask = inputs.text(config.text.vocab_size, lengths, seed, width=width, last=last)
        torch.save(ids, exchange / f"{name}.pt")
        torch.save(mask, exchange / f"{name}_mask.pt")
    if LOADER in plan.tasks:
        loader.save(plan.video or inputs.DEFAULT_VIDEO, plan.batch, exchange)
    return description


def notes(plan: Plan) -> list[str]:
    found = []
    if plan.preset == "tiny":
        found.append("The tiny model has little arithmetic: its times are the overheads of many small operators.")
    if plan.device != "cpu" and "compiled" in plan.baselines:
        found.append(
            "The compiled peer: torch.compile with max_autotune and without coordinate descent. Its products are "
            "cuBLAS's, which beat Triton's templates at these sizes. Its decoding step is a CUDA graph."
        )
    less = ", ".join(task for task in plan.tasks if plan.reference_decodes_less(task))
    if less:
        found.append(
            f"The reference was timed at {plan.reference_steps} of {plan.steps} steps: {less}. Ratios to it are lower "
            "bounds, and results are not compared."
        )
    return found


def measure(groups: list[Group]) -> None:
    """Times nothing before all workers have started and warmed up."""
    with ExitStack() as stack:
        for group in groups:
            group.start(stack)
        for group in groups:
            group.prepare()
        for group in groups:
            group.take_turns()


class Group:
    """Workers that are alive together: the reference, and the implementations of a family of tasks in some dtypes.

    Attributes:
        runs: by worker and task, without failed workers; empty if the reference failed.
        slow: tasks whose first run by the reference counted.
    """

    def __init__(
        self, plan: Plan, family: str, dtypes: tuple[str, ...], exchange: str, progress: Progress, results: Results
    ) -> None:
        self.plan, self.family, self.progress, self.results = plan, family, progress, results
        self.tasks = plan.tasks_of("fast", family)
        self.specs = list(plan.specs(family, dtypes, exchange))
        self.processes: dict[Spec, Process] = {}
        self.runs: dict[Spec, dict[str, Measured]] = {}
        self.gone: set[Spec] = set()
        self.slow: set[str] = set()

    def start(self, stack: ExitStack) -> None:
        """Starts all workers side by side."""
        for spec in self.specs:
            self.processes[spec] = stack.enter_context(Process(spec.label, Worker, spec))

    def prepare(self) -> None:
        """First runs of all workers, not timed."""
        for spec in self.specs:
            self._try(spec, self._begin)
        self._try(self.specs[0], self._first_runs_of_reference)
        for spec in self.specs[1:]:
            self._try(spec, self._warm_up)

    def take_turns(self) -> None:
        """The timed runs."""
        for spec in list(self.runs):
            self._try(spec, lambda spec: self.processes[spec].call(Worker.settle))
        for repeat in range(self.plan.repeats):
            for task in self.tasks:
                for spec in list(self.runs):
                    if task in self.runs.get(spec, ()) and not (spec == self.specs[0] and task in self.slow):
                        self._try(spec, self._timed, task, f"run {repeat + 1} of {self.plan.repeats}")
        for spec in list(self.runs):
            self._try(spec, self._remark)

    def _try(self, spec: Spec, do: Callable[..., None], *arguments: Any) -> None:
        """Calls `do(spec, *arguments)` unless the worker has failed before. If it fails it is left out from now on."""
        if spec not in self.gone:
            try:
                do(spec, *arguments)
            except ProcessError as error:
                self._leave_out(spec, error)

    def _begin(self, spec: Spec) -> None:
        self.progress.begin(f"{self.family} · {spec.label} · starting")
        backend, _ = self.processes[spec].ready().call(Worker.describe)
        self.runs[spec] = {task: Measured(backend) for task in self.plan.tasks_of(spec.implementation, self.family)}

    def _remark(self, spec: Spec) -> None:
        _, remarks = self.processes[spec].call(Worker.describe)
        self.results.notes += [f"{spec.label}, {self.family}: {remark}." for remark in remarks]

    def _once(self, spec: Spec, task: str, what: str, times: int = 1) -> dict[str, Any]:
        what = f"{task} · {spec.label} · {what}"
        self.progress.begin(what)
        reply = self.processes[spec].call(Worker.run, task, times)
        self.progress.finished(what, reply["seconds"])
        return reply

    def _timed(self, spec: Spec, task: str, what: str) -> None:
        self.runs[spec][task].add(self._once(spec, task, what, self.plan.runs_a_turn))

    def _first_runs_of_reference(self, reference: Spec) -> None:
        """Writes the inputs and results of all tasks."""
        own = self.runs[reference]
        before = [task for wanted in own for task in BEFORE.get(wanted, ())]
        self._compare_gradients(reference)
        for task in dict.fromkeys([*before, *own]):
            reply = self._once(reference, task, "first run")
            if task in own and reply["seconds"] > SLOW_SECONDS:
                self.runs[reference][task].add(reply)
                self.slow.add(task)
        if self.slow:
            named = ", ".join(task for task in self.tasks if task in self.slow)
            self.results.notes.append(f"Reference timed once, no warm-up (> {SLOW_SECONDS:g} s): {named}.")

    def _warm_up(self, spec: Spec) -> None:
        self._compare_gradients(spec)
        for task, measured in self.runs[spec].items():
            measured.warm_up(self._once(spec, task, "warming up", WARM_UPS.get(self.plan.device.split(":")[0], 1)))

    def _compare_gradients(self, spec: Spec) -> None:
        for task in [task for task in self.runs[spec] if task in STEPS]:
            self.progress.begin(f"{task} · {spec.label} · comparing gradients")
            self.runs[spec][task].relative_error = self.processes[spec].call(Worker.compare_gradients, task)

    def _leave_out(self, spec: Spec, error: ProcessError) -> None:
        """Notes a missing baseline. Without ours its dtype has no row, without the reference none has."""
        baseline = self.plan.baseline(spec.implementation)
        if baseline in ("eager", "compiled"):
            lost = [spec]
            needs = " On a CPU it needs a C++ compiler and the headers of Python." if baseline == "compiled" else ""
            self.results.notes.append(f"The {baseline} peer is missing for {self.family}: {error}.{needs}")
        else:
            lost = self.specs if baseline else [other for other in self.specs[1:] if other.dtype == spec.dtype]
            dtypes = dict.fromkeys(other.dtype for other in lost if other != self.specs[0])
            for key in (self.plan.key(task, dtype) for task in self.tasks for dtype in dtypes):
                self.results.failed[key.full] = str(error)
        for each in lost:
            self.gone.add(each)
            self.runs.pop(each, None)
            self.processes[each].close()


Runs = Mapping[Spec, Mapping[str, Measured]]
"""By worker and task."""


def tabulate(plan: Plan, family: str, results: Runs, ceilings: Mapping[str, Any]) -> list[Row]:
    """The rows of one group of workers, by task and dtype."""
    ours = {spec: runs for spec, runs in results.items() if plan.baseline(spec.implementation) is None}
    return [
        loader_row(plan, spec.dtype, runs)
        if task == LOADER
        else row(plan, task, spec.dtype, runs[task], baselines(plan, task, spec.dtype, results), ceilings)
        for task in plan.tasks_of("fast", family)
        for spec, runs in ours.items()
    ]


def loader_row(plan: Plan, dtype: str, runs: Mapping[str, Measured]) -> Row:
    """The time in which one process prepares a batch. The ratio to a step says how often it is ready in time."""
    ours, (task, step) = runs[LOADER], next(iter(runs.items()))
    found = row(plan, LOADER, dtype, ours, {}, {"copy_gb_per_second": 1.0})
    return replace(found, flop=None, bytes=None, baselines={task: baseline(ours, step, task, False)}, backend="PyAV")


def of_loader(rows: Iterable[Row], batch: int) -> list[str]:
    """What bounds a training run, the loader or the step."""
    found = []
    for ours in (row for row in rows if row.key.name == LOADER):
        ((task, step),) = ours.baselines.items()
        slower = "loader" if ours.seconds > step.seconds else "step"
        found.append(
            f"{task}, {ours.key.dtype}: one process prepares {batch / ours.seconds:.3g} videos per second, and a "
            f"step takes {batch / step.seconds:.3g}: the {slower} bounds training with one such process."
        )
    return found


def baselines(plan: Plan, task: str, dtype: str, results: Runs) -> dict[str, Measured]:
    """The baselines of a row, in the order of `bench.plan.BASELINES`."""
    found = {}
    for spec, runs in results.items():
        name = plan.baseline(spec.implementation)
        if name is None and dtype in EIGHT_BIT and spec.dtype not in EIGHT_BIT:
            name = spec.dtype  # ours with wider weights
        elif name not in (None, "reference") and spec.dtype != dtype:
            name = None
        if name and task in runs:
            found[name] = runs[task]
    return found


def row(
    plan: Plan, task: str, dtype: str, ours: Measured, others: Mapping[str, Measured], ceilings: Mapping[str, Any]
) -> Row:
    flop, moved = plan.needed_flop(task), plan.needed_bytes(task, dtype)
    tflops, gb_per_second, percent, bound = under.place(flop, moved, ours.median, dtype, ceilings)
    judged = not plan.reference_decodes_less(task)
    error = ours.relative_error if judged else None
    allowed = allowed_error(task, dtype, others) if judged else None
    return Row(
        key=plan.key(task, dtype),
        seconds=ours.median,
        spread=Turns({OURS: ours.seconds}).spread(),
        runs=len(ours.seconds),
        flop=flop,
        bytes=moved,
        tflops=tflops,
        gb_per_second=gb_per_second,
        percent_of_ceiling=percent,
        bound=bound,
        baselines={name: baseline(ours, other, name, judged) for name, other in others.items()},
        peak_memory_bytes=ours.peak_memory_bytes,
        added_memory_bytes=ours.added_memory_bytes,
        relative_error=error,
        allowed_error=allowed,
        correct=within(error, allowed),
        backend=ours.backend,
        command=plan.command(task, dtype),
        tokens=plan.tokens(task),
        recomputed_flop=plan.recomputed_flop(task),
    )


def baseline(ours: Measured, other: Measured, name: str, judged: bool) -> Baseline:
    compared = judged and name != "reference"
    return Baseline(
        seconds=other.median,
        ratio=Turns({OURS: ours.seconds, name: other.seconds}).ratio(name),
        peak_memory_bytes=other.peak_memory_bytes,
        relative_error=other.relative_error if compared else None,
    )


def allowed_error(task: str, dtype: str, others: Mapping[str, Measured]) -> float | None:
    """Twice the error of the peer in the same dtype, eager if it ran, plus a noise floor. Without a peer: the floor in
    float32, otherwise None."""
    floor = noise_floor(task, dtype)
    for name in ("eager", "compiled"):
        error = others[name].relative_error if name in others else None
        if error is not None and math.isfinite(error):
            return 2 * error + floor
    return floor if dtype == "float32" else None


def noise_floor(task: str, dtype: str) -> float:
    """`NOISE` for thousands of values, whose error hardly varies. A task that returns one score per video gets
    `SCORE_NOISE`, because the peer's own error is large or zero by chance."""
    return SCORE_NOISE if task in DECODING and dtype != "float32" else NOISE


def within(error: float | None, allowed: float | None) -> bool:
    """Without a bound the error must at least be finite."""
    return error is None or (math.isfinite(error) if allowed is None else error <= allowed)
