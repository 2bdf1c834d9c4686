"""Rows of results, the request for them, and the file of results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

LEVELS = ("ops", "modules", "model", "train", "video")
INT8, FP8 = EIGHT_BIT = "int8", "fp8"
"""Dtypes of a model whose wide weights have 8 bits, on a CPU and on a GPU. Others are bfloat16 or float32."""
DIRECTIONS = ("forward", "backward", "both")
SIZES = ("quick", "base", "large", "edge")
COMPARED = ("reference", "eager", "torch", "compiled", "xformers", "flash_attn", "apex", "liger_kernel")
"""Baselines that do the same work. Other baselines only bound it."""


@dataclass(frozen=True)
class Key:
    """What was measured. Two runs compare rows of the same key.

    Attributes:
        level: one of `LEVELS`.
        name: of the operator, module or task: "attention", "TemporalBlock", "captioning".
        sizes: the preset, and whatever else distinguishes the work: "large, universal".
        direction: "forward", "backward" (gradients alone, the forward pass outside the clock) or "both".
        dtype: as torch names it, without "torch.".
        device: "cpu" or "cuda".
    """

    level: str
    name: str
    sizes: str
    direction: str
    dtype: str
    device: str

    @property
    def full(self) -> str:
        """The key in `Results.failed`."""
        return f"{self.level} · {self}"

    def __str__(self) -> str:
        direction = "" if self.direction == "forward" else f" {self.direction}"
        return f"{self.name}{direction} · {self.sizes} · {self.dtype}"


@dataclass(frozen=True)
class Selection:
    """What to measure of operators, modules and files.

    Attributes:
        preset: "tiny", "base" or "large": of modules and files.
        sizes: of operators, from `SIZES`.
        only: names; empty for all.
    """

    preset: str
    dtypes: tuple[str, ...]
    device: str = "cpu"
    directions: tuple[str, ...] = ("forward",)
    sizes: tuple[str, ...] = ("large",)
    only: tuple[str, ...] = ()
    quick: bool = False

    def wants(self, key: Key) -> bool:
        return not self.only or key.name in self.only


@dataclass(frozen=True)
class Baseline:
    """Something measured in turns with a row.

    Attributes:
        seconds: median of its runs.
        ratio: how many times faster the row is: the median over the turns of this time over the row's.
        peak_memory_bytes: of a process that holds nothing else; None where it was not measured.
        relative_error: as the row's.
    """

    seconds: float
    ratio: float
    peak_memory_bytes: int | None = None
    relative_error: float | None = None


@dataclass(frozen=True)
class Row:
    """One work: how fast it runs and against what. None means not applicable or not measured.

    Attributes:
        seconds: median of `runs` runs. spread: half the distance between the quartiles, over the median.
        flop, bytes: what the work needs, whatever the implementation does. A multiply-add is 2 FLOP; each argument,
            weight and result moves once.
        tflops, gb_per_second: those over the time.
        percent_of_ceiling: share of the binding ceiling, "compute" (the best matrix product of the dtype) or "memory"
            (a copy), both measured in the same run.
        baselines: "reference" (the official form, eager, float32), "eager" (plain PyTorch in the same dtype), "torch"
            (PyTorch's own operators), "compiled" (those under torch.compile, weights frozen and packed on a CPU), a
            package by its name, and what bounds the work ("copy", "GEMM").
        peak_memory_bytes: of a fresh process on a CPU, with weights and libraries; of the allocator on CUDA.
        added_memory_bytes: what the call added to the weights and inputs.
        relative_error: norm of the difference over the norm, against float32 or better.
        allowed_error: twice the error of eager code in the same dtype, plus a noise floor. correct: within it.
        backend: what ran. command: measures the row again.
        tokens: of a training step, those of video and text.
        recomputed_flop: what checkpointing computes twice, which is not in `flop`.
    """

    key: Key
    seconds: float
    spread: float | None
    runs: int | None
    flop: int | None
    bytes: int | None
    tflops: float | None
    gb_per_second: float | None
    percent_of_ceiling: float | None
    bound: str | None
    baselines: Mapping[str, Baseline]
    peak_memory_bytes: int | None
    added_memory_bytes: int | None
    relative_error: float | None
    allowed_error: float | None
    correct: bool
    backend: str
    command: str
    tokens: int | None = None
    recomputed_flop: int | None = None

    def ratio(self, baseline: str) -> float | None:
        return self.baselines[baseline].ratio if baseline in self.baselines else None

    def flat(self) -> dict[str, Any]:
        """Flat names for CSV: `compiled` is a ratio, `compiled.seconds` its time."""
        values = asdict(self.key)
        for each in fields(self):
            if each.name not in ("key", "baselines"):
                values[each.name] = getattr(self, each.name)
        for name, baseline in self.baselines.items():
            values[name] = baseline.ratio
            values |= {f"{name}.{part}": value for part, value in asdict(baseline).items() if part != "ratio"}
        return values

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Row:
        baselines = {name: Baseline(**value) for name, value in row["baselines"].items()}
        return cls(**{**row, "key": Key(**row["key"]), "baselines": baselines})


@dataclass
class Results:
    """A run: machine, versions, ceilings, rows, failures and notes for readers.

    Attributes:
        ceilings: as `bench.ceilings.measure` returns them.
        failed: `Key.full` -> why.
    """

    machine: dict[str, Any]
    versions: dict[str, Any]
    ceilings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises `ValueError` if the file contains something else."""
        try:
            values = json.loads(path.read_text())
            return cls(**{**values, "rows": [Row.from_json(row) for row in values["rows"]]})
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: not results of this benchmark ({type(error).__name__}: {error}); measure them with "
                f"python bench/run.py --json {path.name}"
            ) from error

    def __getitem__(self, key: Key) -> Row:
        return {row.key: row for row in self.rows}[key]


def names_of_baselines(rows: Iterable[Row]) -> list[str]:
    """The baselines of all rows, in the order in which they are shown."""
    found = dict.fromkeys(name for row in rows for name in row.baselines)
    return [name for name in COMPARED if name in found] + [name for name in found if name not in COMPARED]


def on_roofline(rows: Iterable[Row]) -> list[Row]:
    """The rows that a roofline shows: forward passes with FLOP and bytes, without edge cases."""
    return [
        row
        for row in rows
        if row.flop and row.bytes and row.key.direction == "forward" and not row.key.sizes.startswith("edge")
    ]
