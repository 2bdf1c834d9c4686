"""From keys to rows: each case is built and timed in one process, and its memory measured in another."""

from __future__ import annotations

import importlib
import shlex
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench import ceilings, clock, machine, memory, process
from bench.case import OURS, Agreement
from bench.clock import Budget, Turns
from bench.progress import Progress
from bench.row import COMPARED, Baseline, Key, Results, Row


@dataclass(frozen=True)
class Settings:
    """How cases are measured.

    Attributes:
        baselines: from `bench.row.COMPARED`. Baselines that only bound a work are always measured.
        compiled: names of the works that are also measured under torch.compile; None for all.
        mode: from `bench.clock.MODES`.
        processes: how many time a case, one after another: where memory lies makes small works faster or slower.
            Compiled cases have one.
        more: processes for the works of these names, which vary more.
        memory: whether to measure peak memory, in one more process.
        quick: smaller ceilings.
        apart: whether each case has its own process. On CUDA all share this one, because starting one takes long and
            the allocator reports memory.
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
        """The baselines of a key."""
        compiles = self.compiled is None or key.name in self.compiled
        return tuple(name for name in self.baselines if name != "compiled" or compiles)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result, from its own process if cases have one."""
        return process.run("the case", function, *arguments) if self.apart else function(*arguments)


@dataclass(frozen=True)
class Measured:
    """What the process of a case returns."""

    turns: Turns
    agreement: Agreement
    flop: int
    bytes: int
    backend: str


def build(key: Key, *, compile: bool) -> Any:
    """The case of a key."""
    return importlib.import_module(f"bench.{key.level}.cases").build(key, compile=compile)


def time_case(key: Key, settings: Settings, agreement: Agreement | None = None) -> Measured:
    """Times a case. Results are compared unless `agreement` is given."""
    prepare(settings)
    timer = clock.clock(key.device, settings.mode)
    case = build(key, compile="compiled" in settings.of(key))
    agreement = agreement or case.agreement()
    wanted = set(settings.of(key))
    if "reference" in wanted and key.dtype == "float32":
        wanted.add("eager")  # the same code
    left_out = set(COMPARED) - wanted
    prepared = {way: calls() for way, calls in case.ways.items() if way not in left_out}
    ways = {way: calls if timer.rotates else calls[:1] for way, calls in prepared.items()}
    backend = f"{case.backend}, CUDA graph" if settings.mode == "graph" else case.backend
    return Measured(clock.take(ways, timer, settings.budget), agreement, case.flop, case.bytes, backend)


def weigh_case(key: Key, settings: Settings) -> tuple[int, int] | None:
    """(peak bytes, bytes that the call added); None if the system does not report them."""
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
    """The result of `bench.ceilings.measure`, from a process like those of the cases."""
    return progress.timed("ceilings", lambda: settings.call(_ceilings, device, dtypes, settings))


def _ceilings(device: str, dtypes: list[str], settings: Settings) -> dict[str, Any]:
    prepare(settings)
    return ceilings.measure(device, dtypes, quick=settings.quick)


def run(keys: Iterable[Key], settings: Settings, progress: Progress, best: dict[str, Any]) -> Results:
    """Rows of all keys, in order. Keys that cannot be measured are in `failed`.

    Args:
        best: ceilings from `bench.ceilings.measure`.
    """
    keys = list(keys)
    described, versions = machine.describe()
    described |= {"threads": settings.threads, "device": keys[0].device}
    measured, failed = {}, {}
    for key in keys:
        try:
            measured[key] = progress.timed(key.full, lambda key=key: measure(key, settings))
        except Exception as error:
            known = isinstance(error, process.ProcessError)
            if not known:
                traceback.print_exception(error)
            failed[key.full] = str(error) if known else repr(error)
    rows = [row(key, *found, best, settings) for key, found in measured.items()]
    return Results(described, versions, best, rows, failed)


def measure(key: Key, settings: Settings) -> tuple[Measured, Any]:
    """Times, and (peak, added) bytes or None."""
    processes = 1 if "compiled" in settings.of(key) else settings.more.get(key.name, settings.processes)
    found = [settings.call(time_case, key, settings)]
    found += [settings.call(time_case, key, settings, found[0].agreement) for _ in range(processes - 1)]
    timed_case = replace(found[0], turns=clock.together([each.turns for each in found]))
    return timed_case, settings.call(weigh_case, key, settings) if settings.memory else None


def row(key: Key, found: Measured, weighed: tuple[int, int] | None, best: Mapping[str, Any], settings: Settings) -> Row:
    seconds, agreement = found.turns, found.agreement
    placed = ceilings.place(found.flop, found.bytes, seconds.median(), ceilings.dtype_of(key), best)
    baselines = {
        way: Baseline(seconds.median(way), seconds.ratio(way), None, agreement.baselines.get(way))
        for way in seconds.seconds
        if way != OURS
    }
    if "reference" not in baselines and key.dtype == "float32" and "eager" in baselines:
        baselines = {"reference": replace(baselines["eager"]), **baselines}  # eager float32 code is the official form
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
    """The command that measures a row again, with these baselines unless all are wanted."""
    kind, *_ = key.sizes.split(",")
    words = ["python", "bench/run.py", "--level", key.level, "--only", key.name]
    words += ["--sizes" if key.level == "ops" else "--preset", kind, "--dtype", key.dtype]
    words += ["--direction", key.direction, "--device", key.device]
    words += ["--threads", str(settings.threads)] if key.device == "cpu" else []
    words += ["--mode", settings.mode] if settings.mode != "cold" else []
    if settings.of(key) != COMPARED:
        words += ["--baselines", ",".join(baselines)]
    return shlex.join(words)
