"""Random calls of operators: fitting and other shapes, any strides, types, claims and memory.

Each call returns what the reference returns, or raises a Python exception. `make fuzz` runs thousands with a native
module that checks every address: `python -m tests.ops.fuzz --calls 2000`.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from random import Random
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mplug2_fast import ops
from mplug2_fast.ops.runtime import cpu
from mplug2_fast.ops.runtime.op import Op
from tests.ops.suite import ISAS, as_tuple

SECONDS = 120
"""Seconds for one call, after which the process ends."""
HUGE = 1 << 40
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float64: 2e-4}
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float64)

Mutation = Callable[[Random, Tensor], Any]


def _other_size(rng: Random, t: Tensor) -> Tensor:
    shape = list(t.shape) or [1]
    at = rng.randrange(len(shape))
    shape[at] = max(0, shape[at] + rng.choice((-2, -1, 1, 7)))
    return torch.ones(shape, dtype=t.dtype)


def _one_for_all(rng: Random, t: Tensor) -> Tensor:
    return t.flatten()[:1].view((1,) * t.dim()).expand(t.shape) if t.numel() else t


def _huge(rng: Random, t: Tensor) -> Tensor:
    shape = list(t.shape) or [1]
    shape[rng.randrange(len(shape))] = HUGE
    return torch.ones((1,) * len(shape), dtype=t.dtype).expand(shape)


def _freed(rng: Random, t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(rng.choice((0, t.untyped_storage().nbytes() // 2)))
    return t


def _shifted(rng: Random, t: Tensor) -> Tensor:
    """A copy at an address that is not a multiple of a vector's size."""
    memory = torch.zeros(t.numel() + 3, dtype=t.dtype)
    memory[3:] = t.flatten()
    return memory[3:].view(t.shape)


def _backwards(rng: Random, t: Tensor) -> Tensor:
    axes = list(reversed(range(t.dim())))
    return t.permute(axes).contiguous().permute(axes)


def _overlapping(rng: Random, t: Tensor) -> Tensor:
    memory = torch.rand(sum(t.shape) + 1).to(t.dtype)
    return memory.as_strided(t.shape, (1,) * t.dim())


def _negative(rng: Random, t: Tensor) -> Tensor:
    return torch._neg_view(-t) if t.is_floating_point() else t


def _not_finite(rng: Random, t: Tensor) -> Tensor:
    if not t.is_floating_point() or not t.numel():
        return t
    t = t.clone()
    t.view(-1)[rng.randrange(t.numel())] = rng.choice((torch.nan, torch.inf, -torch.inf, 3e38))
    return t


MUTATIONS: dict[str, Mutation] = {
    "every other element": lambda rng, t: torch.stack([t, t], dim=-1)[..., 0],
    "backwards": _backwards,
    "shifted": _shifted,
    "one for all": _one_for_all,
    "overlapping": _overlapping,
    "negative": _negative,
    "not finite": _not_finite,
    "another size": _other_size,
    "one axis less": lambda rng, t: t[0] if t.dim() and len(t) else t.sum(),
    "one axis more": lambda rng, t: t[None],
    "nothing": lambda rng, t: t[..., :0] if t.dim() else t,
    "huge": _huge,
    "freed": _freed,
    "another type": lambda rng, t: t.to(rng.choice((*DTYPES, torch.int32, torch.uint8, torch.bool, torch.complex64))),
    "random integers": lambda rng, t: torch.randint(-3, 99, t.shape).to(t.dtype),
    "sparse": lambda rng, t: t.to_sparse() if t.is_floating_point() else t,
    "meta": lambda rng, t: t.to("meta"),
    "none": lambda rng, t: None,
}
# After these, results are not compared: NaN and what overlaps may be computed in any order.
INCOMPARABLE = {"not finite", "overlapping", "meta", "sparse", "random integers"}
SCALARS = {
    bool: (True, False),
    int: (-1, 0, 1, 3, 2**31, HUGE, -(2**63), 2**63 - 1),
    float: (0.0, -1.0, 1e-5, 1e30, float("nan"), float("inf")),
    str: ("none", "gelu", "quick_gelu", "", "relu"),
}


def arguments(op: Op, rng: Random) -> tuple[dict[str, Any], list[str]]:
    """Arguments of an operator, and what was done to them."""
    sizes, done = dict(rng.choice(op.spec.edge_cases)), []
    for name, size in sizes.items():
        if type(size) is int and rng.random() < 0.15:
            sizes[name] = rng.choice((0, 1, 2, 3, 17, 64, 65))
    try:
        given = op.spec.inputs(sizes, rng.choice(DTYPES), seed=rng.randrange(1 << 30))
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError):  # no such sizes
        given = op.spec.inputs(op.spec.edge_cases[0], rng.choice(DTYPES))
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 3))):
        name = rng.choice(list(given))
        value = given[name]
        if {f"{name}: freed", f"{name}: huge"} & {*done}:  # other changes would read all of its memory
            continue
        if isinstance(value, Tensor):
            what = rng.choice(list(MUTATIONS))
            try:
                given[name] = MUTATIONS[what](rng, value)
            except (RuntimeError, TypeError, NotImplementedError):  # of a tensor that was changed before
                continue
            done.append(f"{name}: {what}")
        elif type(value) in SCALARS and rng.random() < 0.5:
            given[name] = rng.choice(SCALARS[type(value)])
            done.append(f"{name}: {given[name]}")
    return given, done


def ways(op: Op, rng: Random) -> tuple[str, Callable[..., Any]]:
    """How the operator is called."""
    way = rng.choice(("function", "function", "torch.ops", "train", "backward", "gradients"))
    if way == "torch.ops" or (not op.spec.differentiable and way in ("train", "backward", "gradients")):
        return "torch.ops", op.torch_op
    if way == "train":
        saves = op.training_op is not op.torch_op
        return way, lambda *given: op.training_op(*given)[: len(op.spec.results)] if saves else op.training_op(*given)
    if way == "backward":
        return way, lambda *given: _call_backward(op, rng, given)
    if way == "gradients":
        return way, lambda *given: _call_gradients(op, given)
    return way, op


def _call_backward(op: Op, rng: Random, given: tuple[Any, ...]) -> None:
    try:
        results = as_tuple(op(*given))
    except Exception:
        results = (torch.ones(2, 3),) * len(op.spec.results)
    grads = [None if rng.random() < 0.2 else torch.ones_like(result) for result in results]
    if rng.random() < 0.3:
        grads[0] = torch.ones(5, 2)
    needs = [given[index] is not None or rng.random() < 0.1 for index in op.derivatives.wanted]
    op.derivatives.backward_op(grads, *given, needs, None if rng.random() < 0.8 else [torch.ones(2)])


def _call_gradients(op: Op, given: tuple[Any, ...]) -> None:
    leaves = list(given)
    for index in op.derivatives.wanted:
        if isinstance(leaves[index], Tensor) and leaves[index].is_floating_point():
            leaves[index] = leaves[index].detach().requires_grad_()
    results = [r for r in as_tuple(op(*leaves)) if r.requires_grad]
    torch.autograd.backward(results, [torch.ones_like(r) for r in results])


def call(op: Op, seed: int) -> str:
    """Makes one call and returns how it ended. Raises AssertionError if the result differs from the reference's."""
    rng = Random(f"{op.name} {seed}")
    torch.manual_seed(seed)
    given, done = arguments(op, rng)
    way, function = ways(op, rng)
    backend = rng.choice((None, None, "cpu", "torch"))
    theirs = (
        {n: v.clone() if isinstance(v, Tensor) and n in _written(op) else v for n, v in given.items()}
        if (not any(kind in what for what in done for kind in ("freed", "huge")))
        else None
    )
    with ExitStack() as stack:
        if backend in op.backends:
            stack.enter_context(ops.use_backend(backend))
        try:
            results = function(*given.values())
        except Exception as error:
            return type(error).__name__
    if results is None or theirs is None or any(kind in what for what in done for kind in INCOMPARABLE):
        return "returned"
    try:
        expected = as_tuple(op.spec.reference(**theirs))
    except Exception:
        with ops.use_backend("torch"):
            try:
                expected = as_tuple(op(*theirs.values()))
            except Exception as error:
                raise AssertionError(f"{op.name} {seed} {way} {done}: returned, where PyTorch raises {error}") from None
    for index, (ours, eager) in enumerate(zip(as_tuple(results), expected, strict=True)):
        assert ours.shape == eager.shape, f"{op.name} {seed} {way} {done}: {ours.shape}, not {eager.shape}"
        if ours.is_floating_point() and torch.isfinite(eager).all():
            error = _distance(ours, eager)
            bound = TOLERANCE[min(ours.dtype, eager.dtype, key=lambda t: t.itemsize)] * eager.double().norm() + 1e-3
            if error > bound:  # a norm of nearly equal channels differs for every rounding
                exact = as_tuple(op.spec.reference(**theirs, upcast=True))[index]
                with ops.use_backend("torch"):
                    torchs = as_tuple(op(*theirs.values()))[index]
                bound = max(bound, _distance(eager, exact), _distance(torchs, exact))
                error = _distance(ours, exact)
            assert error <= bound, f"{op.name} {seed} {way} {done}: off by {error:.3g}, {bound:.3g} allowed"
    return "compared"


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return (one.double() - other.double()).norm()


def _written(op: Op) -> list[str]:
    return [op.names[index] for index in op.written_at]


def calls(op: Op, first: int, count: int) -> Iterator[str]:
    for seed in range(first, first + count):
        with torch.no_grad() if seed % 2 else torch.enable_grad():
            yield call(op, seed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=2000, help="of each operator and instruction set")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first call")
    parser.add_argument("--only", choices=list(ops.OPERATORS), nargs="*", default=list(ops.OPERATORS))
    chosen = parser.parse_args()
    print(f"native module: {cpu.module().__file__}", flush=True)
    failures = 0
    for name in chosen.only:
        for isa in ISAS:
            ended: Counter[str] = Counter()
            with mock.patch.object(cpu, "isa", lambda isa=isa: isa):
                for seed in range(chosen.first, chosen.first + chosen.calls):
                    faulthandler.dump_traceback_later(SECONDS, exit=True)
                    print(f"\r{name} {isa.name} {seed}", end="", file=sys.stderr, flush=True)
                    try:
                        ended.update(calls(ops.OPERATORS[name].op, seed, 1))
                    except AssertionError as error:
                        failures += 1
                        print(f"\n{error}", flush=True)
            print(f"\r{name} {isa.name}: {dict(ended.most_common())}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
