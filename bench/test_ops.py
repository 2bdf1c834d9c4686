"""The operators under pytest-benchmark.

    pytest bench                                            # all operators, directions and dtypes at Base sizes
    pytest bench --sizes large -k "attention and bfloat16 and backward"
    pytest bench --benchmark-save NAME                      # with the options of pytest-benchmark

Works, inputs and checks are those of `python bench/run.py --level ops`. There the ways take turns, so its ratios are
reliable on a busy machine. Here they are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import machine
from bench.case import OURS, Call, Case
from bench.clock import Clock, clock
from bench.ops import cases
from bench.row import DIRECTIONS, Selection

DTYPES = ("float32", "bfloat16")
WAYS = (OURS, "eager", "torch")
SECONDS, MIN_ROUNDS, MAX_ROUNDS = 0.5, 5, 200


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes, device = metafunc.config.getoption("sizes"), metafunc.config.getoption("device")
    keys = cases.keys(Selection("base", DTYPES, device, DIRECTIONS, sizes=(sizes,)))
    names = ["-".join((key.name, key.sizes.replace(", ", "-"), key.direction, key.dtype)) for key in keys]
    metafunc.parametrize("case", keys, ids=names, indirect=True, scope="module")
    metafunc.parametrize("way", WAYS)


@pytest.fixture(scope="module", autouse=True)
def kept_memory() -> None:
    machine.keep_freed_memory()


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return cases.build(request.param, compile=False)


def test_operator(case: Case, way: str, benchmark: Any) -> None:
    calls, device = case.ways[way](), case.key.device
    turns = itertools.cycle(calls)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = next(turns)
        return (call.run, *call.before()), {}

    def run(work: Callable[..., Any], *given: Any) -> None:
        work(*given)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    benchmark.group = str(case.key)
    benchmark.extra_info["backend"] = case.backend if way == OURS else way
    benchmark.pedantic(run, setup=setup, rounds=1 if benchmark.disabled else rounds(calls, clock(device)))
    if way == OURS:
        found = case.agreement()
        assert found.ours <= found.allowed


def rounds(calls: list[Call], timer: Clock) -> int:
    """As many rounds as take about half a second, after all calls have warmed up. Slow calls get one."""
    for call in calls:
        call()
    seconds = timer(calls[0])
    return 1 if seconds > SECONDS else max(MIN_ROUNDS, min(MAX_ROUNDS, int(SECONDS / seconds)))
