"""What became of each module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        path: its name in the model; empty for the model itself.
        module: the name of its class.
        replacement: the name of the class that it has now, or None where it was left as it is.
        reason: why it was left, or what there is to know about the replacement.
    """

    path: str
    module: str
    replacement: str | None
    reason: str = ""

    @property
    def outcome(self) -> str:
        if self.replacement is None:
            return f"left: {self.reason}"
        return f"→ {self.replacement}{f' ({self.reason})' if self.reason else ''}"


@dataclass(frozen=True)
class Report:
    """What `accelerate` did. Printed, it has a line a module, or a line for a range of modules alike."""

    entries: tuple[Entry, ...]

    @property
    def replaced(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.replacement is not None)

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.replacement is None)

    def __str__(self) -> str:
        lines = list(self._lines())
        paths, modules = (max((len(line[i]) for line in lines), default=0) for i in (0, 1))
        return "\n".join(f"{path:{paths}}  {module:{modules}}  {outcome}" for path, module, outcome in lines)

    def _lines(self) -> Iterator[tuple[str, str, str]]:
        """(path, class, outcome), with neighbours that differ in one number of their path alone made one."""
        by_pattern: dict[tuple[str, ...], list[Entry]] = {}
        for entry in self.entries:
            pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1#", entry.path, count=1)
            by_pattern.setdefault((pattern, entry.module, entry.outcome), []).append(entry)
        for (pattern, module, outcome), entries in by_pattern.items():
            if "#" not in pattern:
                yield from ((entry.path or "(the model)", module, outcome) for entry in entries)
                continue
            numbers = [int(re.search(r"(?:^|\.)(\d+)(?:\.|$)", entry.path)[1]) for entry in entries]  # type: ignore[index]
            for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
                values = [number for _, number in run]
                shown = str(values[0]) if len(values) == 1 else f"{{{values[0]}..{values[-1]}}}"
                yield pattern.replace("#", shown, 1), module, outcome
