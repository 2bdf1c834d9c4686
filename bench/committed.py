"""The committed results: bench/results/MACHINE/NAME.json.

People name the folder, because processors often report a vague name ("AMD EPYC"), which is in the files. The kind of a
file follows from its contents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.row import Results, Row, on_roofline

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class File:
    """One file of results.

    Attributes:
        kind: "rows" (`bench.row.Results`), "waterfall", "scaling" or "bulk".
        held: `Results` for rows, otherwise the parsed JSON.
    """

    path: Path
    kind: str
    held: Any

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def picture(self) -> Path | None:
        """The file of its picture, beside it; None if there is nothing to draw."""
        if self.kind == "rows":
            return self.path.with_name(f"{self.name}-roofline.png") if on_roofline(self.held.rows) else None
        return None if self.kind == "bulk" else self.path.with_suffix(".png")

    @property
    def machine(self) -> Mapping[str, Any]:
        return self.held.machine if self.kind == "rows" else self.held["machine"]

    @property
    def versions(self) -> Mapping[str, Any]:
        return self.held.versions if self.kind == "rows" else self.held["versions"]


@dataclass(frozen=True)
class Machine:
    """A folder of results."""

    name: str
    files: tuple[File, ...]

    @property
    def runs(self) -> list[Results]:
        return [file.held for file in self.files if file.kind == "rows"]

    @property
    def device(self) -> str:
        return "cuda" if any(row.key.device.startswith("cuda") for run in self.runs for row in run.rows) else "cpu"

    def captioning(self) -> Iterator[tuple[Results, Row]]:
        """Captioning end to end, Large, in each dtype and batch."""
        for run in self.runs:
            for row in run.rows:
                if (row.key.level, row.key.name, row.key.sizes.split(", ")[0]) == ("model", "captioning", "large"):
                    yield run, row


def machines(folder: Path = RESULTS) -> list[Machine]:
    """The machines with results, by name."""
    found = []
    for each in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = tuple(filter(None, map(read, sorted(each.glob("*.json")))))
        if files:
            found.append(Machine(each.name, files))
    return found


def read(path: Path) -> File | None:
    """None if the file contains no results. Raises `ValueError` if they come from another version."""
    values = json.loads(path.read_text())
    kind = _kind(values)
    if kind is None:
        return None
    return File(path, kind, Results.read(path) if kind == "rows" else values)


def _kind(values: Any) -> str | None:
    if not isinstance(values, dict) or "machine" not in values:
        return None
    if "ceilings" in values:
        return "rows"
    first = next(iter(values.get("rows", ())), {})
    kinds = {"technique": "waterfall", "axis": "scaling"}
    return next((kind for field, kind in kinds.items() if field in first), "bulk" if "files" in values else None)
