"""Turns, with a clock that is told what time it is."""

import pytest

from bench.case import OURS, Call
from bench.turns import Budget, Turns, take, together


class Clock:
    """Calls tell their seconds themselves."""

    rotates, slow = True, 0.5

    def __init__(self):
        self.order = []

    def __call__(self, call):
        name, seconds = call()
        self.order.append(name)
        return seconds


def calls(name, *seconds):
    return [Call(lambda each=each: (name, each)) for each in seconds]


def test_ways_take_turns_with_the_next_of_their_inputs():
    clock = Clock()
    turns = take({OURS: calls(OURS, 0.1, 0.2), "eager": calls("eager", 0.4, 0.4)}, clock, Budget(1.0, fewest=3))
    assert clock.order[:6] == [OURS, "eager"] * 3
    assert turns.seconds[OURS][:4] == [0.1, 0.2, 0.1, 0.2]
    assert turns.ratio("eager") == pytest.approx(3.0)  # of 4, 2, 4, 2, ...


def test_a_ratio_holds_while_the_machine_drifts():
    drift = [1.0 + turn / 10 for turn in range(40)]
    slower = [3 * seconds for seconds in drift]
    assert Turns({OURS: drift, "eager": slower}).ratio("eager") == pytest.approx(3.0)
    assert Turns({OURS: drift, "eager": [3.0]}).ratio("eager") == pytest.approx(3.0 / 2.95)


def test_turns_of_several_processes():
    parts = [Turns({OURS: [1.0], "eager": [2.0]}), Turns({OURS: [3.0, 1.0], "eager": [9.0, 4.0]})]
    assert together(parts).seconds == {OURS: [1.0, 3.0, 1.0], "eager": [2.0, 9.0, 4.0]}
    assert together(parts).ratio("eager") == 3.0


def test_what_is_slow_is_timed_once_but_ours_never():
    ways = {OURS: calls(OURS, 0.6), "eager": calls("eager", 0.7), "torch": calls("torch", 0.3)}
    turns = take(ways, Clock(), Budget(1.0, fewest=5))
    assert turns.seconds["eager"] == [0.7]
    assert len(turns.seconds[OURS]) == len(turns.seconds["torch"]) == 5
    assert turns.ratio("eager") == pytest.approx(0.7 / 0.6)


def test_spread_is_half_the_distance_of_the_quartiles():
    turns = take({OURS: calls(OURS, 1.0, 2.0, 3.0, 4.0)}, Clock(), Budget(0.0, fewest=4))
    assert turns.spread() == pytest.approx((3.75 - 1.25) / 2 / 2.5)
    assert take({OURS: calls(OURS, 1.0)}, Clock(), Budget(0.0, fewest=1)).spread() == 0.0
