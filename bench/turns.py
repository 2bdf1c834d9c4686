"""Times several ways of doing one work in turns, A B C A B C, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.case import OURS, Call
from bench.clock import Clock


@dataclass(frozen=True)
class Budget:
    """How long a case may take.

    Attributes:
        seconds: for each way. fewest, most: turns.
        slow: seconds of a call above which a baseline is timed once.
    """

    seconds: float = 1.5
    fewest: int = 5
    most: int = 300
    slow: float = 5.0


@dataclass(frozen=True)
class Turns:
    """Seconds of every way, turn by turn."""

    seconds: Mapping[str, list[float]]

    def median(self, way: str = OURS) -> float:
        return statistics.median(self.seconds[way])

    def spread(self, way: str = OURS) -> float:
        """Half the distance between the quartiles, over the median; 0 for a single run."""
        if len(self.seconds[way]) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds[way], n=4)
        return (high - low) / 2 / self.median(way)

    def ratio(self, way: str) -> float:
        """How many times faster ours is: the median over the turns; of the medians where there are not as many."""
        ours, other = self.seconds[OURS], self.seconds[way]
        if len(ours) != len(other):
            return statistics.median(other) / statistics.median(ours)
        return statistics.median(b / a for a, b in zip(ours, other, strict=True))


def together(parts: Sequence[Turns]) -> Turns:
    """The turns of several processes, one after the other."""
    return Turns({way: [each for part in parts for each in part.seconds[way]] for way in parts[0].seconds})


def take(ways: Mapping[str, list[Call]], clock: Clock, budget: Budget) -> Turns:
    """Every way is warmed up, which is also when it compiles, on all of its inputs, and then timed in turns. A baseline
    that is slow is called twice, and the second time counts."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    turn_takes = 0.0
    for way, (first, *others) in ways.items():
        first()
        taken = clock(first)
        if taken > min(clock.slow, budget.slow) and way != OURS:
            seconds[way].append(taken)
            continue
        turn_takes += taken
        for call in others:
            call()
    repeated = [way for way in ways if not seconds[way]]
    turns = int(budget.seconds * len(repeated) / max(turn_takes, 1e-9))
    for turn in range(min(budget.most, max(budget.fewest, turns))):
        for way in repeated:
            calls = ways[way]
            seconds[way].append(clock(calls[turn % len(calls)]))
    return Turns(seconds)
