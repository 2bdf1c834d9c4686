"""Two runs, row by row: what became slower, what became wrong, and a gate that holds on a noisy machine.

Seconds of two runs say little: the whole machine may be slower today. Ways that took turns in one run were slowed
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
"""A ratio that moves by less between two runs may not have moved at all."""
LIMIT = 0.1
"""From where on a row is called slower or faster, where no limit is given."""
MACHINE = ("cpu", "cores", "simd", "threads", "gpu", "device")
VERSIONS = ("torch", "native")
"""What both runs need to have in common for their ratios to mean the same."""
COLOURS = {"slower": "red", "wrong": "red", "faster": "green", "correct again": "green", "not judged": "yellow"}


@dataclass(frozen=True)
class Change:
    """A row that both runs have."""

    old: Row
    new: Row

    @property
    def key(self) -> Key:
        return self.new.key

    @property
    def ratios(self) -> dict[str, tuple[float, float]]:
        """Baseline -> how many times faster the row was and is, where both runs say."""
        both = {name: (self.old.ratio(name), self.new.ratio(name)) for name in self.old.baselines}
        return {name: pair for name, pair in both.items() if all(r is not None and 0 < r < math.inf for r in pair)}

    @property
    def times(self) -> dict[str, float]:
        """Baseline -> how much longer the row takes than it did, measured by this baseline: 0.25 is 25% longer."""
        return {name: old / new - 1 for name, (old, new) in self.ratios.items()}

    @property
    def time(self) -> float | None:
        """How much longer the row takes than it did, all baselines considered; None where the runs have none in common.

        The median of what the baselines say. If one baseline was disturbed, in either run, the others outvote it; if
        one became slower for good, its ratio rises and would hide our own loss, and the others outvote that too.

        Of an even number, two are in the middle. That nearer to no change counts: if we are as fast as before and one
        of two baselines moved, the other says "no change", and it is right. But if both moved, beyond noise and in
        opposite directions, one moved baseline is no explanation: then the longer time counts, for a baseline that is
        slower itself must not hide that we are. A single baseline is believed; a gate measures again. One measurement
        under two names, as eager float32 code is also the reference, has one vote.
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
    """What two runs say of one another.

    Attributes:
        changes: of the rows that both have, in the order of the newer run.
        gone, added: rows that only the older or only the newer run has.
        failed: rows of the older run that could not be measured in the newer one, or not again -> why.
        again: rows that a gate measured again -> what every measurement said of their time, the first included.
        notes: what makes the comparison doubtful, and what a gate measured again.
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
            f"the runs have no row in common: {_some(before)} then, {_some(after)} now; measure with the same options"
        )
    return Comparison(
        changes,
        gone=[key for key in gone if key not in failed],
        added=[key for key in after if key not in before],
        failed=failed,
        notes=list(_differences(old, new)),
    )


def regressions(comparison: Comparison, limit: float) -> list[Regression]:
    """Rows that take more than `limit` longer by their ratios, became wrong, or cannot be measured any more."""
    found = [
        Regression(change.key, _why(change))
        for change in comparison.changes
        if change.verdict(limit) in ("slower", "wrong")
    ]
    return found + [Regression(key, f"cannot be measured any more: {why}") for key, why in comparison.failed.items()]


def gate(
    old: Results, new: Results, limit: float, measure_again: Callable[[Key], Row], attempts: int = 3
) -> Comparison:
    """A comparison for `regressions` of the same limit: a row that looks slower is measured again, and remains slower
    only if every measurement says so. A row that became wrong, or that cannot be measured, counts at once.

    Args:
        limit: how much longer a row may take, by its ratios.
        measure_again: measures the row of a key, with its baselines.
        attempts: measurements of a row at the most, that in `new` included.

    Raises:
        ValueError: the runs have no row in common, or none that can be judged.
    """
    comparison = compare(old, new)
    if all(change.verdict(limit) == "not judged" for change in comparison.changes) and not comparison.failed:
        raise ValueError("no row can be judged: the runs have no baseline in common; measure with the same options")
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
            notes.append(f"not judged: {change.key}: the runs have no baseline of it in common")
        if change.key not in failed:
            changes.append(change)
    return replace(comparison, changes=changes, failed=failed, again=again, notes=comparison.notes + notes)


def show(comparison: Comparison, limit: float = LIMIT, console: Console | None = None) -> None:
    """Prints what changed. Times in seconds are for information; verdicts are from the ratios alone."""
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
        known = "" if error is None or allowed is None else f": its error is {error:.1e}, {allowed:.1e} is allowed"
        return f"was correct and is wrong{known}"
    ratios = ", ".join(f"{name} {old:.3g}× → {new:.3g}×" for name, (old, new) in change.ratios.items())
    return f"takes {_percent(change.time)} of time: {ratios}"


def _differences(old: Results, new: Results) -> Iterator[str]:
    compared = (("machine", MACHINE, old.machine, new.machine), ("version", VERSIONS, old.versions, new.versions))
    for what, names, before, after in compared:
        for name in names:
            was, now = before.get(name), after.get(name)
            if was != now:
                yield f"another {what}, by which alone ratios may differ: {name} was {was} and is {now}"


def _some(rows: dict[Key, Row]) -> str:
    names = [str(key) for key in rows]
    return "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _percent(time: float | None) -> str:
    return "–" if time is None else f"{time:+.0%}"
