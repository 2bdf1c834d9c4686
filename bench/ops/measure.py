"""Times operators and what they are held against, in turns: A B C A B C, and medians count."""

from __future__ import annotations

import importlib
import math
import shlex
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import ceilings, machine
from bench.ops import compiled
from bench.ops.baseline import Arguments
from bench.ops.clock import Clock, clock
from mplug2_fast import ops

# Rotated so that none is in the cache when its turn comes.
ROTATED_BYTES = 160 << 20
SECONDS, FEWEST, MOST = 1.5, 5, 200


@dataclass(frozen=True)
class OpRow:
    """One operator at one size in one dtype. None is what does not apply.

    Attributes:
        milliseconds: of one call that finds nothing in the cache; on CUDA without the time of launching it.
        spread: half the distance between the quartiles, over the median.
        gb_per_second: bytes that have to be read and written at least, over the time.
        x_eager: how many times faster than the specification's plain eager code in the same dtype.
        x_torch: than PyTorch's own operators. x_compiled: than those compiled, weights frozen and packed.
        baseline, x_baseline: what the operator is held against, and how many times faster it is than that.
        target: what is meant to be reached on a CPU, with met or missed; against the baseline, or as it says.
        relative_error: against the eager code in float32.
    """

    op: str
    sizes: str
    dtype: str
    milliseconds: float
    spread: float
    gflops: float
    gb_per_second: float
    x_eager: float
    x_torch: float
    x_compiled: float | None
    baseline: str | None
    x_baseline: float | None
    target: str | None
    relative_error: float
    backend: str
    command: str


def run(
    names: list[str], preset: str, dtypes: list[str], device: str, threads: int, progress: Any, *, compile: bool
) -> dict[str, Any]:
    """The results as they are written to JSON. What cannot be measured is among the `failed`, with the reason."""
    torch.set_num_threads(threads)
    machine.keep_freed_memory()
    described, versions = machine.describe()
    described["threads"] = threads
    best = ceilings.measure(device, dtypes)
    rows, failed = [], []
    for name in names:
        sizes = {key: value for key, value in ops.OPERATORS[name].op.spec.models.items() if key.startswith(preset)}
        for key in sizes:
            for dtype in dtypes:
                what = f"{name} · {key} · {dtype}"
                progress.begin(what)
                start = time.perf_counter()
                try:
                    rows.append(asdict(measure(name, key, getattr(torch, dtype), device, compile=compile)))
                except Exception as error:
                    traceback.print_exception(error)
                    failed.append(
                        {"op": name, "sizes": key, "dtype": dtype, "error": f"{type(error).__name__}: {error}"}
                    )
                progress.finished(what, time.perf_counter() - start)
    best = ceilings.merge(best, ceilings.measure(device, dtypes))
    described["device"] = device
    return {"machine": described, "versions": versions, "ceilings": best, "rows": rows, "failed": failed}


@torch.no_grad()
def measure(name: str, key: str, dtype: torch.dtype, device: str = "cpu", *, compile: bool) -> OpRow:
    timer = clock(device)
    operator, module = ops.OPERATORS[name], importlib.import_module(f"bench.ops.{name}")
    spec, op = operator.op.spec, operator.op
    first = spec.inputs(spec.models[key], dtype, device)
    copies = min(8, max(1, math.ceil(ROTATED_BYTES / max(spec.bytes(first, ()), 1)))) if timer.rotates else 1
    given = [first, *(spec.inputs(spec.models[key], dtype, device, seed) for seed in range(1, copies))]
    for argument in first:  # one set of weights for all, packed as the model packs them
        if argument.endswith("weight"):
            for other in given[1:]:
                other[argument] = first[argument]
            if isinstance(first[argument], Tensor) and first[argument].dim() == 2:
                ops.pack_weight(first[argument], 4112)

    with ops.strict():
        out = op(*first.values())
    error = relative_error(out, spec.reference(**in_float32(first)))
    torch_run = op.backends["torch"].run
    ways: dict[str, Callable[[Arguments], Callable[[], Any]]] = {
        "ours": lambda a: partial(op, *a.values()),
        "eager": lambda a: partial(spec.reference, *a.values()),
        "torch": lambda a: partial(torch_run, *a.values()),
    }
    if compile:
        peer = compiled.prepare(torch_run, first)
        ways["compiled"] = lambda a: partial(peer, *compiled.inputs(a))
    for baseline in module.BASELINES:
        ways[baseline.name] = baseline.prepare
    prepared = {way: [prepare(arguments) for arguments in given] for way, prepare in ways.items()}
    seconds = take_turns(prepared, timer)
    median = {way: statistics.median(times) for way, times in seconds.items()}
    label = str(dtype).removeprefix("torch.")
    low, _, high = statistics.quantiles(seconds["ours"], n=4)
    ratio = {way: value / median["ours"] for way, value in median.items()}
    baseline = module.BASELINES[0] if module.BASELINES else None
    return OpRow(
        op=name,
        sizes=key,
        dtype=label,
        milliseconds=1e3 * median["ours"],
        spread=(high - low) / 2 / median["ours"],
        gflops=spec.flops(**first) / median["ours"] / 1e9,
        gb_per_second=spec.bytes(first, out) / median["ours"] / 1e9,
        x_eager=ratio["eager"],
        x_torch=ratio["torch"],
        x_compiled=ratio.get("compiled"),
        baseline=None if baseline is None else baseline.name,
        x_baseline=None if baseline is None else ratio[baseline.name],
        target="; ".join(targets(module, dtype, ratio)) or None if device == "cpu" else None,
        relative_error=error,
        backend=op.explain(*first.values()).chosen or "",
        command=shlex.join(
            ["python", "bench/run.py", "--ops", name, "--preset", key.split(",")[0], "--dtype", label]
            + (["--device", device] if device != "cpu" else [])
        ),
    )


def targets(module: Any, dtype: torch.dtype, ratio: dict[str, float]) -> Iterator[str]:
    """What is meant to be reached, and whether it was."""
    meant = [(baseline.name, baseline.target) for baseline in module.BASELINES]
    meant += [("eager", getattr(module, "X_EAGER", {})), ("compiled", getattr(module, "X_COMPILED", {}))]
    for name, target in meant:
        if dtype in target and name in ratio:
            met = "met" if ratio[name] >= target[dtype] else "missed"
            yield f"≥ {target[dtype]:g}× {name}: {met}"


def take_turns(ways: dict[str, list[Callable[[], Any]]], timer: Clock) -> dict[str, list[float]]:
    """Seconds of every call, way by way, each in its turn with the next of its inputs."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    slowest = 0.0
    for way, runs in ways.items():
        for call in runs:  # warm-up, and the compiler's time
            call()
        first = timer(runs[0])
        if first > timer.slow:
            seconds[way].append(first)
        else:
            slowest += first
    rounds = min(MOST, max(FEWEST, int(SECONDS * len(ways) / slowest)))
    repeated = [way for way in ways if not seconds[way]]
    for turn in range(rounds):
        for way in repeated:
            seconds[way].append(timer(ways[way][turn % len(ways[way])]))
    return seconds


def in_float32(arguments: Arguments) -> Arguments:
    def wide(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float32
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: wide(value) for name, value in arguments.items()}


def relative_error(out: Any, expected: Any) -> float:
    """Of all floating-point results together."""
    pairs = [
        (o.double(), e.double())
        for o, e in zip(*(x if isinstance(x, tuple) else (x,) for x in (out, expected)), strict=True)
        if e.is_floating_point()
    ]
    difference = math.sqrt(sum(float((o - e).square().sum()) for o, e in pairs))
    return difference / math.sqrt(sum(float(e.square().sum()) for _, e in pairs))
