"""One line of results, of any level, and the file of many of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

LEVELS = ("ops", "modules", "model", "video")
DIRECTIONS = ("forward", "backward", "both")
COMPARED = ("reference", "eager", "torch", "compiled", "xformers", "flash_attn", "apex", "liger_kernel")
"""Baselines that do the same work. What merely bounds a work has a name of its own."""


@dataclass(frozen=True)
class Key:
    """What was measured; two runs compare rows of the same key.

    Attributes:
        level: one of `LEVELS`.
        name: of the operator, the module or the task: "attention", "TemporalBlock", "captioning".
        sizes: the preset, and what else tells one work from another: "large, universal".
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
        """As `Results.failed` names it."""
        return f"{self.level} · {self}"

    def __str__(self) -> str:
        direction = "" if self.direction == "forward" else f" {self.direction}"
        return f"{self.name}{direction} · {self.sizes} · {self.dtype}"


@dataclass(frozen=True)
class Baseline:
    """Something that was measured in turns with a row.

    Attributes:
        seconds: median of its runs.
        ratio: how many times faster the row is: the median over the turns of this one's time over the row's.
        peak_memory_bytes: of a process that holds only this one; None where it was not measured.
        relative_error: its own, as the row's.
    """

    seconds: float
    ratio: float
    peak_memory_bytes: int | None = None
    relative_error: float | None = None


@dataclass(frozen=True)
class Row:
    """One work, how fast it is done here, and against what. None is what does not apply or was not measured.

    Attributes:
        seconds: the median of `runs` runs. spread: half the distance between the quartiles, over the median.
        flop, bytes: what the work needs, whatever is really done: one multiply-add is 2; every argument, weight and
            result moved once.
        tflops, gb_per_second: those over the time.
        percent_of_ceiling: of the ceiling that binds, "compute" (the best matrix product of the dtype) or "memory" (a
            copy), both measured in the same run.
        baselines: "reference" (the released form, eager, float32), "eager" (plain PyTorch in the same dtype), "torch"
            (PyTorch's own operators), "compiled" (those through torch.compile, weights frozen and packed on a CPU), a
            package by its name, and what bounds the work ("copy", "GEMM").
        peak_memory_bytes: of a fresh process on a CPU, weights and libraries included; of the allocator on CUDA.
        added_memory_bytes: the part of it that was not there before the call: neither weights nor inputs.
        relative_error: norm of the difference over the norm, against float32 or better.
        allowed_error: twice the error of eager code in the same dtype, and a floor for noise. correct: not above it.
        backend: what ran. command: the command that measures the row again.
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

    def ratio(self, baseline: str) -> float | None:
        return self.baselines[baseline].ratio if baseline in self.baselines else None

    def flat(self) -> dict[str, Any]:
        """One level of names, for CSV: `compiled` is a ratio, `compiled.seconds` its time."""
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
    """A run: the machine, the versions, both ceilings, the rows, what could not be measured, and notes for readers.

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
        """Raises `ValueError` if the file holds something else."""
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
    """Of all rows, each once, in the order in which they are shown."""
    found = dict.fromkeys(name for row in rows for name in row.baselines)
    return [name for name in COMPARED if name in found] + [name for name in found if name not in COMPARED]
