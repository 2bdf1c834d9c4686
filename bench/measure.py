"""The measurement: worker processes side by side, one run of each in turn, medians of the runs."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import inputs, machine
from bench.plan import QUESTION_TOKENS, Plan
from bench.progress import Progress
from bench.row import Results
from bench.rows import tabulate
from bench.workers import Client, Spec, WorkerError
from mplug2_fast.info import available_memory

# A reference that is this slow is neither warmed up nor repeated: its first run counts.
SLOW_SECONDS = 5.0
# On a GPU a first run tunes and compiles, and a second one captures graphs.
WARM_UPS = {"cuda": 3}
# What the reference has to compute first so that a task has its input.
BEFORE = {"universal": ("vision",), "decode": ("vision", "universal")}


@dataclass
class Measured:
    """The runs of one task by one worker."""

    backend: str
    seconds: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    added_memory_bytes: int | None = None
    relative_error: float | None = None

    def warm_up(self, reply: dict[str, Any]) -> None:
        """A run that is not timed. What a process first takes it may keep, so that no later run adds as much."""
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
    """All rows of the plan; what could not be measured is in `failed`, and a baseline that is missing in the notes.

    Args:
        ceilings: of `bench.ceilings.measure`.
    """
    described, versions = machine.describe()
    described |= {"threads": plan.threads, "device": plan.device}
    results = Results(described, versions, ceilings)
    with tempfile.TemporaryDirectory() as exchange:
        results.notes += [f"Input: {save_inputs(plan, Path(exchange))}.", *notes(plan)]
        groups = fitting(plan, available_memory(), results.notes)
        measured = [Group(plan, *group, exchange, progress, results) for group in groups]
        # Of a model that is this small, all workers start while the first compile.
        for alive in [measured] if plan.preset == "tiny" else [[group] for group in measured]:
            measure(alive)
    for group in measured:
        results.rows += tabulate(plan, group.family, group.runs, results.ceilings)
    order = [plan.key(task, dtype) for task in plan.tasks for dtype in plan.dtypes]
    results.rows.sort(key=lambda row: order.index(row.key))
    return results


def fitting(plan: Plan, available: int, notes: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The plan's groups, without training where memory cannot hold it: the system would end a process, any of them."""
    groups = []
    for family, dtypes in plan.groups(available):
        needed = plan.resident_bytes(family, dtypes)
        if family == "training" and plan.device == "cpu" and needed > available:
            notes.append(
                f"No training in {', '.join(dtypes)}: with all baselines it takes about {needed / 1e9:.0f} GB of "
                f"memory and there are {available / 1e9:.0f}. Give fewer --frames, --baselines or a smaller --preset."
            )
        else:
            groups.append((family, dtypes))
    if len(groups) > len({family for family, _ in groups}):
        notes.append("Memory does not hold all workers at once: dtypes were measured one after another.")
    return groups


def save_inputs(plan: Plan, exchange: Path) -> str:
    """Writes what the workers take in, and returns what it is."""
    config = plan.config
    video, description = inputs.load(plan.video, plan.frames, config.vision.image_size)
    torch.save(video.expand(plan.batch, *video.shape).contiguous(), exchange / "video.pt")
    lengths = {"question": QUESTION_TOKENS, "caption": 1 + config.generation.prompt_tokens + plan.steps}
    for seed, (name, tokens) in enumerate(lengths.items()):
        ids, mask = inputs.text(config.text.vocab_size, tokens, plan.batch, seed)
        torch.save(ids, exchange / f"{name}.pt")
        torch.save(mask, exchange / f"{name}_mask.pt")
    return description


def notes(plan: Plan) -> list[str]:
    found = []
    if plan.preset == "tiny":
        found.append("The tiny model has next to no arithmetic: its times are the overheads of many small operators.")
    if plan.device != "cpu" and "compiled" in plan.baselines:
        found.append(
            "The compiled peer: torch.compile with max_autotune, products by cuBLAS, which was found to be faster than "
            "Triton's templates at these sizes, and without coordinate descent; its decoding step is a CUDA graph."
        )
    less = ", ".join(task for task in plan.tasks if plan.reference_decodes_less(task))
    if less:
        found.append(
            f"The reference was timed at {plan.reference_steps} of {plan.steps} steps: {less}. Its ratios are lower "
            "bounds there, and results are not compared."
        )
    return found


def measure(groups: list[Group]) -> None:
    """Nothing is timed before all have started and warmed up."""
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
        runs: by worker and task, without the workers that failed; without the reference there are none.
        slow: tasks of which the reference's first run counted.
    """

    def __init__(
        self, plan: Plan, family: str, dtypes: tuple[str, ...], exchange: str, progress: Progress, results: Results
    ) -> None:
        self.plan, self.family, self.progress, self.results = plan, family, progress, results
        self.tasks = plan.tasks_of("reference", family)
        self.specs = list(plan.specs(family, dtypes, exchange))
        self.clients: dict[Spec, Client] = {}
        self.runs: dict[Spec, dict[str, Measured]] = {}
        self.gone: set[Spec] = set()
        self.slow: set[str] = set()

    def start(self, stack: ExitStack) -> None:
        """All side by side; what they do until they are ready is not timed."""
        for spec in self.specs:
            self.clients[spec] = stack.enter_context(Client.start(spec))

    def prepare(self) -> None:
        """First runs of all workers."""
        for spec in self.specs:
            self._try(spec, self._begin)
        self._try(self.specs[0], self._first_runs_of_reference)
        for spec in self.specs[1:]:
            self._try(spec, self._warm_up)

    def take_turns(self) -> None:
        """The timed runs."""
        for spec in list(self.runs):
            self._try(spec, lambda spec: self.clients[spec].call("settle"))
        for repeat in range(self.plan.repeats):
            for task in self.tasks:
                for spec in list(self.runs):
                    if task in self.runs.get(spec, ()) and not (spec == self.specs[0] and task in self.slow):
                        self._try(spec, self._timed, task, f"run {repeat + 1} of {self.plan.repeats}")
        for spec in list(self.runs):
            self._try(spec, self._remark)

    def _try(self, spec: Spec, do: Callable[..., None], *arguments: Any) -> None:
        """`do(spec, *arguments)`, if the worker is still there; where that fails it is left out from then on."""
        if spec not in self.gone:
            try:
                do(spec, *arguments)
            except WorkerError as error:
                self._leave_out(spec, error)

    def _begin(self, spec: Spec) -> None:
        what = f"{self.family} · {spec.label} · starting"
        self.progress.begin(what)
        client = self.clients[spec].ready()
        backend = client.call("describe")["backend"]
        self.runs[spec] = {task: Measured(backend) for task in self.plan.tasks_of(spec.implementation, self.family)}

    def _remark(self, spec: Spec) -> None:
        remarks = self.clients[spec].call("describe")["remarks"]
        self.results.notes += [f"{spec.label}, {self.family}: {remark}." for remark in remarks]

    def _once(self, spec: Spec, task: str, what: str, times: int = 1) -> dict[str, Any]:
        what = f"{task} · {spec.label} · {what}"
        self.progress.begin(what)
        reply = self.clients[spec].call("run", task, times)
        self.progress.finished(what, reply["seconds"])
        return reply

    def _timed(self, spec: Spec, task: str, what: str) -> None:
        self.runs[spec][task].add(self._once(spec, task, what, self.plan.runs_a_turn))

    def _first_runs_of_reference(self, reference: Spec) -> None:
        """Leaves the inputs and results of all tasks behind."""
        before = [task for wanted in self.tasks for task in BEFORE.get(wanted, ())]
        self._compare_gradients(reference)
        for task in dict.fromkeys([*before, *self.tasks]):
            reply = self._once(reference, task, "first run")
            if task in self.tasks and reply["seconds"] > SLOW_SECONDS:
                self.runs[reference][task].add(reply)
                self.slow.add(task)
        if self.slow:
            named = ", ".join(task for task in self.tasks if task in self.slow)
            self.results.notes.append(
                f"Timed once, without a warm-up, for it takes over {SLOW_SECONDS:g} s: reference, {named}."
            )

    def _warm_up(self, spec: Spec) -> None:
        self._compare_gradients(spec)
        for task, measured in self.runs[spec].items():
            measured.warm_up(self._once(spec, task, "warming up", WARM_UPS.get(self.plan.device.split(":")[0], 1)))

    def _compare_gradients(self, spec: Spec) -> None:
        if "training" in self.runs[spec]:
            self.progress.begin(f"training · {spec.label} · comparing gradients")
            self.runs[spec]["training"].relative_error = self.clients[spec].call("compare_gradients")

    def _leave_out(self, spec: Spec, error: WorkerError) -> None:
        """Notes a baseline that is missing; without ours there is no row of that dtype, without the reference none."""
        baseline = self.plan.baseline(spec.implementation)
        if baseline in ("eager", "compiled"):
            lost = [spec]
            needs = " On a CPU it needs a C++ compiler and Python's headers." if baseline == "compiled" else ""
            self.results.notes.append(f"The {baseline} peer is missing for {self.family}: {error}.{needs}")
        else:
            lost = self.specs if baseline else [other for other in self.specs[1:] if other.dtype == spec.dtype]
            dtypes = dict.fromkeys(other.dtype for other in lost if other != self.specs[0])
            for key in (self.plan.key(task, dtype) for task in self.tasks for dtype in dtypes):
                self.results.failed[key.full] = str(error)
        for each in lost:
            self.gone.add(each)
            self.runs.pop(each, None)
            self.clients[each].close()
