"""From keys to rows: every case is built and timed in a process of its own, and its memory measured in another."""

from __future__ import annotations

import importlib
import shlex
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench import ceilings, fork, machine, memory, turns
from bench.case import OURS, Agreement
from bench.clock import clock
from bench.progress import Progress
from bench.roofline import place
from bench.row import COMPARED, Baseline, Key, Results, Row
from bench.turns import Budget, Turns


@dataclass(frozen=True)
class Settings:
    """How cases are measured.

    Attributes:
        baselines: of `bench.row.COMPARED`, those that are measured; what bounds a work always is.
        compiled: names of the works for which torch.compile is among them; None for all.
        mode: of `bench.clock.MODES`.
        processes: that a case is timed in, one after the other: what is small is faster or slower by where its memory
            happens to lie. What is compiled has one.
        more: that for the works of these names, which vary more.
        memory: whether peak memory is measured, in one more process.
        quick: smaller ceilings.
        apart: whether every case has a process of its own; on CUDA, where starting one takes long and the allocator
            tells the memory, all share this one.
    """

    threads: int
    baselines: tuple[str, ...] = COMPARED
    compiled: frozenset[str] | None = None
    mode: str = "cold"
    budget: Budget = field(default_factory=Budget)
    processes: int = 1
    more: Mapping[str, int] = field(default_factory=dict)
    memory: bool = True
    quick: bool = False
    apart: bool = True

    def of(self, key: Key) -> tuple[str, ...]:
        """The baselines that are measured for a key."""
        compiles = self.compiled is None or key.name in self.compiled
        return tuple(name for name in self.baselines if name != "compiled" or compiles)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result, from a process of its own if cases have one."""
        return fork.call(function, *arguments) if self.apart else function(*arguments)


@dataclass(frozen=True)
class Measured:
    """What the process of a case sends back."""

    turns: Turns
    agreement: Agreement
    flop: int
    bytes: int
    backend: str


def build(key: Key, *, compile: bool) -> Any:
    """The case of a key, by the module of its level."""
    return importlib.import_module(f"bench.{key.level}.cases").build(key, compile=compile)


def time_case(key: Key, settings: Settings, agreement: Agreement | None = None) -> Measured:
    """Results are compared unless that has been done."""
    prepare(settings)
    timer = clock(key.device, settings.mode)
    case = build(key, compile="compiled" in settings.of(key))
    agreement = agreement or case.agreement()
    wanted = set(settings.of(key))
    if "reference" in wanted and key.dtype == "float32":
        wanted.add("eager")  # which is the same
    left_out = set(COMPARED) - wanted
    prepared = {way: calls() for way, calls in case.ways.items() if way not in left_out}
    ways = {way: calls if timer.rotates else calls[:1] for way, calls in prepared.items()}
    backend = f"{case.backend}, CUDA graph" if settings.mode == "graph" else case.backend
    return Measured(turns.take(ways, timer, settings.budget), agreement, case.flop, case.bytes, backend)


def weigh_case(key: Key, settings: Settings) -> tuple[int, int] | None:
    """(peak bytes, those that were not held before) of one call; None where the system cannot tell."""
    torch.set_num_threads(settings.threads)
    case = build(key, compile=False)
    first = case.ways[OURS]()[0]
    given = first.before()
    memory.give_back()
    before = memory.held(key.device)
    if not memory.reset_peak(key.device):
        return None
    result = first.run(*given)
    if key.device.startswith("cuda"):
        torch.cuda.synchronize(key.device)
    peak = memory.peak(key.device)
    del result
    return peak, max(peak - before, 0)


def prepare(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    machine.keep_freed_memory()


def measure_ceilings(device: str, dtypes: list[str], settings: Settings, progress: Progress) -> dict[str, Any]:
    """As `bench.ceilings.measure` returns them, in a process of its own like all that is compared with them."""
    return timed("ceilings", progress, lambda: settings.call(_ceilings, device, dtypes, settings))


def _ceilings(device: str, dtypes: list[str], settings: Settings) -> dict[str, Any]:
    prepare(settings)
    return ceilings.measure(device, dtypes, quick=settings.quick)


def run(keys: Iterable[Key], settings: Settings, progress: Progress, best: dict[str, Any]) -> Results:
    """Rows of all keys, in order. What cannot be measured is among the `failed`.

    Args:
        best: the ceilings of `bench.ceilings.measure`.
    """
    keys = list(keys)
    described, versions = machine.describe()
    described |= {"threads": settings.threads, "device": keys[0].device}
    measured, failed = {}, {}
    for key in keys:
        try:
            measured[key] = timed(key.full, progress, lambda key=key: measure(key, settings))
        except Exception as error:
            if not isinstance(error, fork.ChildError):
                traceback.print_exception(error)
            failed[key.full] = f"{error if isinstance(error, fork.ChildError) else repr(error)}"
    rows = [row(key, *found, best, settings) for key, found in measured.items()]
    return Results(described, versions, best, rows, failed)


def measure(key: Key, settings: Settings) -> tuple[Measured, Any]:
    """Times, and (peak, added) bytes or None."""
    processes = 1 if "compiled" in settings.of(key) else settings.more.get(key.name, settings.processes)
    found = [settings.call(time_case, key, settings)]
    found += [settings.call(time_case, key, settings, found[0].agreement) for _ in range(processes - 1)]
    timed_case = replace(found[0], turns=turns.together([each.turns for each in found]))
    return timed_case, settings.call(weigh_case, key, settings) if settings.memory else None


def timed(what: str, progress: Progress, work: Callable[[], Any]) -> Any:
    progress.begin(what)
    start = time.perf_counter()
    result = work()
    progress.finished(what, time.perf_counter() - start)
    return result


def row(key: Key, found: Measured, weighed: tuple[int, int] | None, best: Mapping[str, Any], settings: Settings) -> Row:
    seconds, agreement = found.turns, found.agreement
    placed = place(found.flop, found.bytes, seconds.median(), key.dtype, best)
    baselines = {
        way: Baseline(seconds.median(way), seconds.ratio(way), None, agreement.baselines.get(way))
        for way in seconds.seconds
        if way != OURS
    }
    if "reference" not in baselines and key.dtype == "float32" and "eager" in baselines:
        baselines = {"reference": replace(baselines["eager"]), **baselines}  # eager float32 is the released form
    return Row(
        key=key,
        seconds=seconds.median(),
        spread=seconds.spread(),
        runs=len(seconds.seconds[OURS]),
        flop=found.flop or None,
        bytes=found.bytes or None,
        **placed._asdict(),
        baselines=baselines,
        peak_memory_bytes=weighed and weighed[0],
        added_memory_bytes=weighed and weighed[1],
        relative_error=agreement.ours,
        allowed_error=agreement.allowed,
        correct=agreement.ours <= agreement.allowed,
        backend=found.backend,
        command=command(key, settings, tuple(name for name in baselines if name in COMPARED)),
    )


def command(key: Key, settings: Settings, baselines: tuple[str, ...]) -> str:
    """The command that measures a row again, with these baselines unless all were asked for."""
    kind, *_ = key.sizes.split(",")
    words = ["python", "bench/run.py", "--level", key.level, "--only", key.name]
    words += ["--sizes" if key.level == "ops" else "--preset", kind, "--dtype", key.dtype]
    words += ["--direction", key.direction, "--device", key.device]
    words += ["--threads", str(settings.threads)] if key.device == "cpu" else []
    words += ["--mode", settings.mode] if settings.mode != "cold" else []
    if settings.of(key) != COMPARED:
        words += ["--baselines", ",".join(baselines)]
    return shlex.join(words)
