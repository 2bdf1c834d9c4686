"""The measurement: worker processes side by side, one run of each in turn, medians of the runs."""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from bench import ceilings, inputs, machine
from bench.plan import Plan
from bench.rows import Row, tabulate
from bench.workers import Client, Spec, WorkerError
from mplug2_fast.info import available_memory
from mplug2_fast.ops import explain, preprocess_frames

# A reference that is this slow is neither warmed up nor repeated: its first run counts.
SLOW_SECONDS = 5.0
# What the reference has to compute first so that a level has its input.
BEFORE = {"vision": (), "universal": ("vision",), "decode": ("vision", "universal"), "captioning": ()}


class Progress(Protocol):
    def begin(self, what: str) -> None: ...

    def finished(self, what: str, seconds: float) -> None: ...


@dataclass
class Measured:
    """The runs of one level by one worker."""

    backend: str
    seconds: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    relative_error: float | None = None

    def add(self, reply: dict[str, Any]) -> None:
        self.seconds.append(reply["seconds"])
        if reply["peak_memory_bytes"] is not None:
            self.peak_memory_bytes = max(self.peak_memory_bytes or 0, reply["peak_memory_bytes"])
        self.relative_error = reply["relative_error"]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def run(plan: Plan, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    """The results as they are written to JSON, and notes for the reader of the table."""
    described, versions = machine.describe()
    described["threads"] = plan.threads
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as exchange:
        video, description = inputs.load(plan.video, plan.frames, plan.config.vision.image_size)
        notes = [f"Input: {description}."]
        if plan.preset == "tiny":
            notes.append(
                "The tiny model has next to no arithmetic: its times are the overheads of many small operators."
            )
        torch.save(video.expand(plan.batch, *video.shape).contiguous(), Path(exchange) / "video.pt")
        rows += measure_loading(plan)
        groups = plan.groups(available_memory())
        if len(groups) > 1:
            notes.append("Memory does not hold all workers at once: dtypes were measured one after another.")
        with start_ceilings(plan) as client:
            best = measure_ceilings(client, progress)
            measured = [Group(plan, dtypes, exchange, progress, notes).measure() for dtypes in groups]
            best = ceilings.merge(best, measure_ceilings(client, progress))
    for group in measured:
        rows += tabulate(plan, group, best)
    return {"machine": described, "versions": versions, "ceilings": best, "rows": [asdict(row) for row in rows]}, notes


def start_ceilings(plan: Plan) -> Client:
    """The worker for ceilings: a process of its own, like everything that is compared with them."""
    dtypes = tuple(dict.fromkeys(("float32", *plan.dtypes)))
    spec = {"implementation": "ceilings", "device": plan.device, "threads": plan.threads, "dtypes": dtypes}
    return Client({**spec, "quick": plan.quick}, "ceilings")


def measure_ceilings(client: Client, progress: Progress) -> dict[str, Any]:
    progress.begin("ceilings")
    start = time.perf_counter()
    best = client.call("measure")
    progress.finished("ceilings", time.perf_counter() - start)
    return best


def measure_loading(plan: Plan) -> list[Row]:
    """One row for decoding the video file and preparing its frames, where there is a decoder."""
    path = plan.video or inputs.DEFAULT_VIDEO
    if path.suffix == ".npy" or not inputs.has_decoder():
        return []
    seconds = []
    for _ in range(plan.repeats):
        start = time.perf_counter()
        inputs.load(path, plan.frames, plan.config.vision.image_size)
        seconds.append(time.perf_counter() - start)
    served = explain(preprocess_frames, torch.empty(1, 1, 1, 3, dtype=torch.uint8), 1)
    backend = "PyAV, native" if served.chosen == "cpu" else "PyAV, PyTorch"
    return [Row.of_loading(plan, statistics.median(seconds), backend)]


class Group:
    """Workers that are alive together: the reference, and the implementations in some dtypes."""

    def __init__(
        self, plan: Plan, dtypes: tuple[str, ...], exchange: str, progress: Progress, notes: list[str]
    ) -> None:
        self.plan, self.progress, self.notes = plan, progress, notes
        self.specs = list(plan.specs(dtypes, exchange))
        self.clients: dict[Spec, Client] = {}
        self.results: dict[Spec, dict[str, Measured]] = {}

    def measure(self) -> dict[Spec, dict[str, Measured]]:
        """Runs by worker and level; a peer that fails is left out, with a note."""
        with ExitStack() as stack:
            for spec in self.specs:
                self.progress.begin(f"{spec.label} · starting")
                client = self.clients[spec] = stack.enter_context(Client.start(spec))
                backend = client.call("describe")["backend"]
                self.results[spec] = {level: Measured(backend) for level in self.plan.levels}
            slow = self._first_runs_of_reference(self.specs[0])
            for spec in self.specs[1:]:
                self._warm_up(spec)
            for repeat in range(self.plan.repeats):
                for level in self.plan.levels:
                    for spec in self.results:
                        if spec.implementation != "reference" or level not in slow:
                            reply = self._once(spec, level, f"run {repeat + 1} of {self.plan.repeats}")
                            self.results[spec][level].add(reply)
        return self.results

    def _once(self, spec: Spec, level: str, what: str) -> dict[str, Any]:
        what = f"{level} · {spec.label} · {what}"
        self.progress.begin(what)
        reply = self.clients[spec].call("run", level)
        self.progress.finished(what, reply["seconds"])
        return reply

    def _first_runs_of_reference(self, reference: Spec) -> set[str]:
        """Leaves the inputs of all levels behind. Returns the levels that were slow, and whose run counted."""
        levels = self.plan.levels
        before = [level for wanted in levels for level in BEFORE[wanted]]
        slow = set()
        for level in dict.fromkeys([*before, *levels]):
            reply = self._once(reference, level, "first run")
            if level in levels and reply["seconds"] > SLOW_SECONDS:
                self.results[reference][level].add(reply)
                slow.add(level)
        if slow:
            named = ", ".join(level for level in levels if level in slow)
            self.notes.append(
                f"Timed once, without a warm-up, for it takes over {SLOW_SECONDS:g} s: reference, {named}."
            )
        return slow

    def _warm_up(self, spec: Spec) -> None:
        try:
            for level in self.plan.levels:
                self._once(spec, level, "warming up")
        except WorkerError as error:
            if spec.implementation != self.plan.peer:
                raise
            self.notes.append(
                f"The compiled peer is missing: {error}. On a CPU it needs a C++ compiler and Python's headers; "
                "--peer uncompiled needs neither."
            )
            del self.results[spec]
