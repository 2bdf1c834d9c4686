"""The report of `accelerate`: what happened to each module and to its calls."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any


@dataclass
class Calls:
    """Counts the calls of a swapped module.

    Attributes:
        small: `SmallCalls`, or None.
        served: calls that the fast forward computed.
        int8: products with 8-bit weights.
        wide: reason -> products with the wide weights of layers that have 8-bit ones.
        by_parts: reason -> calls that ran the original code with accelerated parts.
        original: reason -> calls that ran the original code.
    """

    small: Any = None
    served: int = 0
    int8: int = 0
    wide: Counter[str] = field(default_factory=Counter)
    by_parts: Counter[str] = field(default_factory=Counter)
    original: Counter[str] = field(default_factory=Counter)

    @property
    def no_gain(self) -> int:
        """Calls that were too small and ran the original code."""
        return 0 if self.small is None else self.small.count

    def left(self, reason: str, by_parts: bool) -> None:
        """Counts a call that ran the original code."""
        (self.by_parts if by_parts else self.original)[reason] += 1

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:  # copies of a module start at zero
        return Calls, ()

    def __bool__(self) -> bool:
        return bool(self.served or self.no_gain or self.int8 or self.wide or self.by_parts or self.original)

    def __str__(self) -> str:
        counts = [f"served {self.served}"] + [f"no gain {self.no_gain}"] * bool(self.no_gain)
        for name, reasons in (("by parts", self.by_parts), ("original", self.original)):
            if reasons:
                counts.append(f"{name} {reasons.total()} ({'; '.join(reasons)})")
        counts += [f"8-bit products {self.int8}"] * bool(self.int8)
        if self.wide:
            counts.append(f"wide products {self.wide.total()} ({'; '.join(self.wide)})")
        return ", ".join(counts)


@dataclass(frozen=True)
class Entry:
    """What happened to one module.

    Attributes:
        path: its name in the model; empty for the model itself.
        module: the name of its class.
        replacement: the name of the fast module, or None if it was left unchanged.
        reason: why it was left unchanged, or a note about the replacement.
        part_of: the path of the replaced module around it, which calls it only if it cannot serve a call itself.
        calls: its calls since it was replaced.
    """

    path: str
    module: str
    replacement: str | None
    reason: str = ""
    part_of: str | None = None
    calls: Calls | None = field(default=None, compare=False, repr=False)

    @property
    def outcome(self) -> str:
        if self.replacement is None:
            return f"left: {self.reason}"
        notes = [note for note in (self.reason, str(self.calls) if self.calls else "") if note]
        return f"→ {self.replacement}" + (f" ({'; '.join(notes)})" if notes else "")


@dataclass(frozen=True)
class Report:
    """What `accelerate` did. It prints one line per module, or per range of equal modules, with counts of their calls.

    Modules inside a replaced one are printed after their first call.
    """

    entries: tuple[Entry, ...]

    @property
    def replaced(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.replacement is not None)

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.replacement is None)

    @property
    def calls(self) -> dict[str, Calls]:
        """Path of a replaced module -> its calls so far."""
        return {entry.path: entry.calls for entry in self.entries if entry.calls is not None}

    def __str__(self) -> str:
        lines = list(self._lines())
        paths, modules = (max((len(line[i]) for line in lines), default=0) for i in (0, 1))
        return "\n".join(f"{path:{paths}}  {module:{modules}}  {outcome}" for path, module, outcome in lines)

    def _lines(self) -> Iterator[tuple[str, str, str]]:
        """(path, class, outcome). Neighbours whose paths differ only in one number share a line."""
        by_pattern: dict[tuple[str, ...], list[Entry]] = {}
        for entry in self.entries:
            if entry.part_of is not None and not entry.calls:
                continue
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
