"""The performance targets, and whether a measurement meets them.

Ratios are to baselines of the same run and shares are of ceilings of the same run, because absolute figures depend on
the machine. The exception is the rate of captioning on a GPU, which is meant for an NVIDIA H200: 790 TFLOP/s in
bfloat16 products, 4.3 TB/s in copies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.modules import operator_call
from bench.row import INT8, Results, Row

Ceilings = Mapping[str, Any]
MET, MISSED, STATED, NOT_MEASURED = "met", "missed", "stated", "not measured"
H200_TFLOPS = 790


@dataclass(frozen=True)
class Quantity:
    """A figure of a row.

    Attributes:
        unit: "×", "%", " GB".
        of: what the figure is of: "reference", "of the GEMM ceiling".
        read: from a row and the ceilings of its run, which may be empty, to the figure; None if the row lacks it.
        digits: after the decimal point.
    """

    unit: str
    of: str
    read: Callable[[Row, Ceilings], float | None]
    digits: int = 0

    def write(self, value: float, bound: float | None = None) -> str:
        """The text of a figure, with enough digits to be on the right side of the bound."""
        digits = self.digits
        while bound is not None and digits < 6 and _side(round(value, digits), bound) != _side(value, bound):
            digits += 1
        return f"{value:,.{digits}f}{self.unit}"


def _side(value: float, bound: float) -> int:
    return (value > bound) - (value < bound)


def times(baseline: str) -> Quantity:
    return Quantity("×", baseline, lambda row, _: row.ratio(baseline), 2)


def _times_sdpa(row: Row, _: Ceilings) -> float | None:
    """The ratio to the fastest kernel; None without PyTorch's own choice."""
    others = [each.ratio for name, each in row.baselines.items() if name == "torch" or name.startswith("SDPA by ")]
    return min(others) if "torch" in row.baselines else None


def share(baseline: str, of: str) -> Quantity:
    """A ratio in percent to work that bounds the row's."""

    def read(row: Row, _: Ceilings) -> float | None:
        ratio = row.ratio(baseline)
        return None if ratio is None else 100 * ratio

    return Quantity("%", of, read)


def bounded(by: str, of: str) -> Quantity:
    return Quantity("%", of, lambda row, _: row.percent_of_ceiling if row.bound == by else None)


def _times_its_traffic(row: Row, ceilings: Ceilings) -> float | None:
    if "copy_gb_per_second" in ceilings and row.gb_per_second:
        return ceilings["copy_gb_per_second"] / row.gb_per_second
    return 100 / row.percent_of_ceiling if row.bound == "memory" and row.percent_of_ceiling else None


def _call_beyond_its_kernel(row: Row, _: Ceilings) -> float | None:
    kernel = row.baselines.get(operator_call.KERNEL)
    return None if kernel is None else 1e6 * (row.seconds - kernel.seconds) / operator_call.CALLS


def _batch(row: Row) -> int:
    sizes = [part.split() for part in row.key.sizes.split(", ")]
    return next((int(words[1]) for words in sizes if words[0] == "batch" and len(words) == 2), 1)


CEILING_SHARE = Quantity("%", "of the ceiling that binds", lambda row, _: row.percent_of_ceiling)
GEMM_SHARE = bounded("compute", "of the GEMM ceiling")
COPY_SHARE = bounded("memory", "of copy bandwidth")
AGAINST_COPY = share("copy", "of copy bandwidth")
TWO_GEMMS = share("two GEMMs", "of the two GEMMs alone")
GEMM = share("GEMM", "of the GEMM alone")
BANDWIDTH = Quantity(" GB/s", "of keys and values, each read once for all beams", lambda row, _: row.gb_per_second, 1)
TRAFFIC = Quantity("×", "the time to read its weights and cache", _times_its_traffic, 2)
REPLAY = Quantity("", "replay of a CUDA graph", lambda row, _: float("CUDA graph" in row.backend))
CALL = Quantity(" µs", "a call beyond its kernel", _call_beyond_its_kernel, 1)
PEAK = Quantity(
    " GB", "peak memory", lambda row, _: None if row.peak_memory_bytes is None else row.peak_memory_bytes / 1e9, 2
)
RATE = Quantity(" TFLOP/s", f"({H200_TFLOPS} is the H200's GEMM ceiling)", lambda row, _: row.tflops)
VIDEOS = Quantity("", "videos per second", lambda row, _: _batch(row) / row.seconds, 1)


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        work: a description.
        level, name, sizes, dtype, device: of the forward rows, or training steps, that it judges. `sizes` are all sizes
            of an operator; sizes of other rows start with it and have `batch` videos.
        bound: of the quantity; None if it is only stated.
        at_most: whether the bound is an upper one.
    """

    work: str
    level: str
    name: str
    sizes: str
    dtype: str
    device: str
    quantity: Quantity
    bound: float | None
    at_most: bool = False
    batch: int = 1

    def is_for(self, row: Row) -> bool:
        key = row.key
        direction = "both" if self.level == "train" else "forward"
        if (key.level, key.name, key.dtype, key.direction) != (self.level, self.name, self.dtype, direction):
            return False
        if key.device.split(":")[0] != self.device:
            return False
        if self.level == "ops":
            return key.sizes == self.sizes
        return key.sizes.split(", ")[0] == self.sizes and _batch(row) == self.batch

    @property
    def wanted(self) -> str:
        """ "≥ 1.3× compiled"."""
        if self.bound is None:
            return f"{self.quantity.unit.strip()} {self.quantity.of}".strip()
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}{self.quantity.unit} {self.quantity.of}"

    def judge(self, row: Row, ceilings: Ceilings) -> Judged:
        return Judged(self, self.quantity.read(row, ceilings))


@dataclass(frozen=True)
class Judged:
    """A target and the measured figure, which is None if it was not measured."""

    target: Target
    value: float | None

    @property
    def verdict(self) -> str:
        """One of "met", "missed", "stated" (without a bound) and "not measured"."""
        if self.value is None or math.isnan(self.value):
            return NOT_MEASURED
        bound = self.target.bound
        if bound is None:
            return STATED
        return MET if (self.value <= bound if self.target.at_most else self.value >= bound) else MISSED

    @property
    def figure(self) -> str | None:
        return None if self.verdict == NOT_MEASURED else self.target.quantity.write(self.value, self.target.bound)

    def __str__(self) -> str:
        """ "≥ 1.3× compiled: missed"; without a bound, the figure."""
        if self.verdict == STATED:
            return f"{self.figure} {self.target.quantity.of}"
        return f"{self.target.wanted}: {self.verdict}"


def of(row: Row, ceilings: Ceilings | None = None) -> list[Judged]:
    """The judged targets of a row. Without the ceilings of its run some have no figure."""
    return [target.judge(row, ceilings or {}) for target in TARGETS if target.is_for(row)]


def judge(runs: Iterable[Results], device: str) -> list[Judged]:
    """All targets for "cpu" or "cuda", each judged by the first row with its figure."""
    runs = list(runs)
    judged = []
    for target in TARGETS:
        if target.device == device:
            found = (target.judge(row, run.ceilings) for run in runs for row in run.rows if target.is_for(row))
            judged.append(next((each for each in found if each.value is not None), Judged(target, None)))
    return judged


def _captioning() -> list[Target]:
    def of(device: str, dtype: str, quantity: Quantity, bound: float, **more: Any) -> Target:
        return Target("captioning end to end", "model", "captioning", "large", dtype, device, quantity, bound, **more)

    return [
        of("cpu", "bfloat16", times("reference"), 30),
        of("cpu", "bfloat16", times("compiled"), 1.3),
        of("cpu", "bfloat16", GEMM_SHARE, 80),
        of("cpu", "bfloat16", PEAK, 3, at_most=True),
        of("cpu", INT8, times("reference"), 20),
        of("cpu", INT8, times("bfloat16"), 1.5),
        of("cpu", INT8, PEAK, 1.6, at_most=True),
        of("cpu", "float32", times("reference"), 16),
        of("cpu", "float32", times("compiled"), 1.6),
        of("cpu", "float32", PEAK, 5, at_most=True),
        of("cuda", "bfloat16", RATE, 0.6 * H200_TFLOPS, batch=32),
        of("cuda", "bfloat16", VIDEOS, 137, batch=32),
        of("cuda", "bfloat16", times("compiled"), 1.3, batch=32),
        of("cuda", "bfloat16", PEAK, 4, at_most=True),
    ]


def _operators() -> list[Target]:
    targets = []

    def add(work: str, name: str, sizes: str, quantity: Quantity, **bounds: float | None) -> None:
        """Adds bounds for `cpu`, in both dtypes or one of them, and for `cuda`, in bfloat16."""
        for where, bound in bounds.items():
            device, _, dtype = where.partition("_")
            for each in [dtype] if dtype else ["bfloat16"] if device == "cuda" else ["float32", "bfloat16"]:
                targets.append(Target(work, "ops", name, sizes, each, device, quantity, bound))

    add("local temporal module", "local_temporal", "large", CEILING_SHARE, cuda=70)
    add("local temporal module", "local_temporal", "large", times("eager"), cpu=3, cuda=4)
    add("local temporal module", "local_temporal", "large", times("compiled"), cpu=1.2, cuda=1.5)
    add("layer norm", "layer_norm", "large", AGAINST_COPY, cpu=80, cuda=85)
    add("residual and layer norm", "add_layer_norm", "large", AGAINST_COPY, cpu=80, cuda=85)
    add("MLP with activation", "mlp", "large", TWO_GEMMS, cpu=95, cuda=90)
    for sizes in ("large", "large, step", "large, steps of 32 videos"):
        work = f"linear layer with activation or residual{sizes.removeprefix('large')}"
        add(work, "linear_act", sizes, GEMM, cpu=95)
    for tokens, sizes in (("257", "large"), ("4097", "large, universal")):
        work = f"attention, {tokens} tokens"
        add(work, "attention", sizes, Quantity("×", "SDPA", _times_sdpa, 2), cpu_float32=1.3, cpu_bfloat16=2.5, cuda=1)
    add("beam cross-attention, one step", "beam_attention", "large", BANDWIDTH, cpu=None)
    add("beam cross-attention, one step", "beam_attention", "large", COPY_SHARE, cuda=80)
    return targets


def _steps() -> list[Target]:
    def of(device: str, dtype: str, quantity: Quantity, bound: float, **more: Any) -> Target:
        return Target(
            "one decoding step, batch 1", "modules", "decoder step", "large", dtype, device, quantity, bound, **more
        )

    return [
        of("cpu", "float32", TRAFFIC, 1.5, at_most=True),
        of("cpu", "bfloat16", TRAFFIC, 1.5, at_most=True),
        of("cuda", "bfloat16", TRAFFIC, 1.5, at_most=True),
        of("cuda", "bfloat16", REPLAY, 1),
    ]


def _calls() -> list[Target]:
    return [
        Target("an operator's own cost", "modules", "operator call", "large", dtype, "cpu", CALL, 15, at_most=True)
        for dtype in ("float32", "bfloat16")
    ]


def _training() -> list[Target]:
    def of(name: str, sizes: str, dtype: str, quantity: Quantity, bound: float, **more: Any) -> Target:
        return Target("training step of captioning", "train", name, sizes, dtype, "cpu", quantity, bound, **more)

    return [
        of("captioning step", "base", "float32", times("reference"), 1.3),
        of("captioning step", "base", "float32", times("compiled"), 1),
        of("captioning step checkpointed", "large", "bfloat16", PEAK, 24, at_most=True),
    ]


def _on_large(work: str, name: str, quantity: Quantity, bound: float, sizes: str = "large") -> Target:
    return Target(work, "model", name, sizes, "float32", "cpu", quantity, bound)


def _retrieval() -> list[Target]:
    return [
        _on_large("re-ranking 128 texts of a video", "re-ranking", times("reference"), 8),
        _on_large("re-ranking 128 texts of a video", "re-ranking", GEMM_SHARE, 75),
        _on_large("features of a video and of 128 texts", "retrieval features", times("compiled"), 1.2),
    ]


def _mplug() -> list[Target]:
    of = functools.partial(_on_large, sizes="mPLUG large")
    return [
        of("mPLUG, re-ranking 128 texts of an image", "re-ranking", times("reference"), 8),
        of("mPLUG, re-ranking 128 texts of an image", "re-ranking", GEMM_SHARE, 75),
        of("mPLUG, an answer to a question", "answering", times("reference"), 3),
        of("mPLUG, an answer to a question", "answering", times("compiled"), 1.2),
    ]


TARGETS = (*_captioning(), *_operators(), *_steps(), *_calls(), *_training(), *_retrieval(), *_mplug())
