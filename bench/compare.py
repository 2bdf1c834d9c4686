"""Compares two runs row by row, and decides whether a row became slower even on a noisy machine.

Seconds of two runs are not comparable, because the whole machine may be slower today. That slows all ways of one run
alike, so only their ratios are judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.row import Key, Results, Row

NOISE = 0.05
"""A smaller change of a ratio may be chance."""
LIMIT = 0.1
"""The default change above which a row is slower or faster."""
MACHINE = ("cpu", "cores", "simd", "threads", "gpu", "device")
VERSIONS = ("torch", "native")
"""Ratios are comparable only if both runs agree in these."""
COLOURS = {"slower": "red", "wrong": "red", "faster": "green", "correct again": "green", "not judged": "yellow"}


@dataclass(frozen=True)
class Change:
    """A row of both runs."""

    old: Row
    new: Row

    @property
    def key(self) -> Key:
        return self.new.key

    @property
    def ratios(self) -> dict[str, tuple[float, float]]:
        """Baseline -> how many times faster the row was and is."""
        both = {name: (self.old.ratio(name), self.new.ratio(name)) for name in self.old.baselines}
        return {name: pair for name, pair in both.items() if all(r is not None and 0 < r < math.inf for r in pair)}

    @property
    def times(self) -> dict[str, float]:
        """Baseline -> how much longer the row takes now, by this baseline: 0.25 is 25% longer."""
        return {name: old / new - 1 for name, (old, new) in self.ratios.items()}

    @property
    def time(self) -> float | None:
        """How much longer the row takes now, by all baselines; None if the runs share no baseline.

        This is the median of the baselines' votes. It outvotes a baseline that was disturbed in either run, and one
        that became slower for good, whose rising ratio would hide our own loss.

        Of an even number of votes, two are in the middle, and the one nearer to no change counts: if our speed is the
        same and one of two baselines moved, the other one is right. If both moved beyond noise in opposite directions,
        the longer time counts, because a slower baseline must not hide our loss. A single baseline decides alone; a
        gate measures again. One measurement under two names, such as eager float32 code and the reference, votes once.
        """
        votes = {(self.old.baselines[name], self.new.baselines[name]): time for name, time in self.times.items()}
        said = sorted(votes.values())
        if not said:
            return None
        shorter, longer = said[(len(said) - 1) // 2], said[len(said) // 2]
        if longer > NOISE and 1 / (1 + shorter) - 1 > NOISE:
            return longer
        return min(shorter, longer, key=lambda time: abs(math.log1p(time)))

    def verdict(self, limit: float) -> str:
        """One of "wrong", "correct again", "slower", "faster", "same" and "not judged"."""
        if self.old.correct and not self.new.correct:
            return "wrong"
        if self.new.correct and not self.old.correct:
            return "correct again"
        if self.time is None:
            return "not judged"
        if self.time > limit:
            return "slower"
        return "faster" if 1 / (1 + self.time) - 1 > limit else "same"


@dataclass(frozen=True)
class Comparison:
    """The differences of two runs.

    Attributes:
        changes: rows of both runs, in the order of the newer one.
        gone, added: rows of only the older or only the newer run.
        failed: row of the older run -> why it could not be measured in the newer run, or not again.
        again: row that a gate measured again -> the change of time in each measurement, the first included.
        notes: doubts about the comparison, and what a gate measured again.
    """

    changes: list[Change]
    gone: list[Key] = field(default_factory=list)
    added: list[Key] = field(default_factory=list)
    failed: dict[Key, str] = field(default_factory=dict)
    again: dict[Key, list[float | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Regression:
    key: Key
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {self.why}"


def parse_limit(text: str) -> float:
    """ "10%" or "0.1" as 0.1.

    Raises:
        ValueError: it is something else, or not between 0 and 100%.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        limit = float(number) / (100 if percent else 1)
    except ValueError:
        limit = math.nan
    if rest or not 0 < limit < 1:
        raise ValueError(f"{text!r} is not a share between 0 and 1: write 10% or 0.1")
    return limit


def compare(old: Results, new: Results) -> Comparison:
    """What changed from one run to another.

    Raises:
        ValueError: the runs have no row in common.
    """
    before, after = ({row.key: row for row in results.rows} for results in (old, new))
    changes = [Change(before[key], row) for key, row in after.items() if key in before]
    gone = [key for key in before if key not in after]
    failed = {key: new.failed[name] for key in gone if (name := key.full) in new.failed}
    if not changes and not failed:
        raise ValueError(
            f"the runs share no row ({_some(before)} before, {_some(after)} now): measure with the same options"
        )
    return Comparison(
        changes,
        gone=[key for key in gone if key not in failed],
        added=[key for key in after if key not in before],
        failed=failed,
        notes=list(_differences(old, new)),
    )


def regressions(comparison: Comparison, limit: float) -> list[Regression]:
    """Rows that became more than `limit` slower by their ratios, became wrong, or could not be measured."""
    found = [
        Regression(change.key, _why(change))
        for change in comparison.changes
        if change.verdict(limit) in ("slower", "wrong")
    ]
    return found + [Regression(key, f"could not be measured: {why}") for key, why in comparison.failed.items()]


def gate(
    old: Results, new: Results, limit: float, measure_again: Callable[[Key], Row], attempts: int = 3
) -> Comparison:
    """A comparison for `regressions` with the same limit. A row that looks slower is measured again, and is slower only
    if all measurements agree. A row that became wrong or cannot be measured counts at once.

    Args:
        limit: how much longer a row may take, by its ratios.
        measure_again: measures the row of a key, with its baselines.
        attempts: the most measurements of a row, including that in `new`.

    Raises:
        ValueError: the runs share no row, or no row can be judged.
    """
    comparison = compare(old, new)
    if all(change.verdict(limit) == "not judged" for change in comparison.changes) and not comparison.failed:
        raise ValueError("no row can be judged, because the runs share no baseline: measure with the same options")
    changes, failed, again, notes = [], dict(comparison.failed), {}, []
    for change in comparison.changes:
        said = [change.time]
        while change.verdict(limit) == "slower" and len(said) < attempts:
            try:
                change = replace(change, new=measure_again(change.key))
            except Exception as error:
                failed[change.key] = f"{type(error).__name__}: {error}"
                break
            said.append(change.time)
        if len(said) > 1 or change.key in failed:
            again[change.key] = said
            outcome = "failed" if change.key in failed else change.verdict(limit)
            notes.append(f"measured again: {change.key}: {', then '.join(map(_percent, said))} of time: {outcome}")
        if change.verdict(limit) == "not judged":
            notes.append(f"not judged: {change.key}: the runs share no baseline of it")
        if change.key not in failed:
            changes.append(change)
    return replace(comparison, changes=changes, failed=failed, again=again, notes=comparison.notes + notes)


def show(comparison: Comparison, limit: float = LIMIT, console: Console | None = None) -> None:
    """Prints the changes. Verdicts come from ratios alone; seconds are for information."""
    table = Table(title="Compared with the earlier run", title_justify="left")
    for head, justify in (("row", "left"), ("ratios", "left"), ("time", "right"), ("ms", "right"), ("verdict", "left")):
        table.add_column(head, justify=justify)
    for change in comparison.changes:
        verdict = change.verdict(limit)
        table.add_row(
            escape(str(change.key)),
            escape("\n".join(f"{name} {old:.3g}× → {new:.3g}×" for name, (old, new) in change.ratios.items())),
            _percent(change.time),
            f"{1e3 * change.old.seconds:.3g} → {1e3 * change.new.seconds:.3g}",
            f"[{COLOURS[verdict]}]{verdict}" if verdict in COLOURS else verdict,
        )
    for key, why in comparison.failed.items():
        table.add_row(escape(str(key)), "", "", "", f"[red]failed: {escape(why)}")
    console = console or Console(width=max(Console().width, 120))
    console.print(table)
    lines = [
        *comparison.notes,
        *(f"only in the earlier run: {key}" for key in comparison.gone),
        *(f"only in this run: {key}" for key in comparison.added),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _why(change: Change) -> str:
    if change.old.correct and not change.new.correct:
        error, allowed = change.new.relative_error, change.new.allowed_error
        known = "" if error is None or allowed is None else f": error {error:.1e}, allowed {allowed:.1e}"
        return f"became wrong{known}"
    ratios = ", ".join(f"{name} {old:.3g}× → {new:.3g}×" for name, (old, new) in change.ratios.items())
    return f"takes {_percent(change.time)} of time: {ratios}"


def _differences(old: Results, new: Results) -> Iterator[str]:
    compared = (("machine", MACHINE, old.machine, new.machine), ("version", VERSIONS, old.versions, new.versions))
    for what, names, before, after in compared:
        for name in names:
            was, now = before.get(name), after.get(name)
            if was != now:
                yield f"ratios may differ because of another {what}: {name} was {was} and is {now}"


def _some(rows: dict[Key, Row]) -> str:
    names = [str(key) for key in rows]
    return "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _percent(time: float | None) -> str:
    return "–" if time is None else f"{time:+.0%}"
