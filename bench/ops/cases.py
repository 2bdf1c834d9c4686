"""The level `ops`: operators at sizes of the models and at edge cases, forward, backward and both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import packages
from bench.case import OURS, Agreement, Call, Case, agreement
from bench.ops import compiled
from bench.ops.bounds import BOUNDS, Arguments
from bench.row import Key, Selection
from mplug2_fast import ops
from mplug2_fast.ops.runtime.spec import Sizes, Spec

NAMES = tuple(ops.OPERATORS)
ROTATED_BYTES, MAX_INPUTS = 160 << 20, 8
"""Total size of the inputs that a timing cycles through. It exceeds the caches, so no input is still cached."""
ROWS = 4112
"""Weights are packed for the rows of the Large vision encoder."""
FRAMES = 16


def keys(selection: Selection) -> list[Key]:
    """Operators of the device by sizes, direction and dtype. Operators without gradients run forward only."""
    found = []
    for name, function in ops.OPERATORS.items():
        spec = function.op.spec
        if selection.device.split(":")[0] not in spec.devices:
            continue
        for sizes in sizes_of(spec):
            for direction in selection.directions:
                for dtype in selection.dtypes:
                    key = Key("ops", name, sizes, direction, dtype, selection.device)
                    known = direction == "forward" or spec.differentiable
                    if known and sizes.split(",")[0] in selection.sizes and selection.wants(key):
                        found.append(key)
    return found


def sizes_of(spec: Spec) -> dict[str, Sizes]:
    """The sizes of an operator by their names in a row: the models', the base model's at two frames, and the edge cases
    that have elements."""
    edges = {f"edge, {described(sizes)}": sizes for sizes in spec.edge_cases}
    edges = {name: sizes for name, sizes in edges.items() if _has_elements(spec, sizes)}
    return {"quick": two_frames(spec.models["base"]), **spec.models, **edges}


def two_frames(sizes: Sizes) -> Sizes:
    """Two frames instead of 16, be they batch, frames or rows; frames with a quarter of the sides."""

    def cut(name: str, value: Any) -> Any:
        if name == "rows" and isinstance(value, tuple):
            return tuple(2 if rows == FRAMES else rows for rows in value)
        if name in ("height", "width", "size"):
            return value // 4
        return 2 if name in ("batch", "frames") and value == FRAMES else value

    return {name: cut(name, value) for name, value in sizes.items()}


def described(sizes: Sizes) -> str:
    def text(value: Any) -> str:
        return "×".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)

    return ", ".join(f"{name} {text(value)}" for name, value in sizes.items())


def _has_elements(spec: Spec, sizes: Sizes) -> bool:
    return all(value.numel() for value in spec.inputs(sizes).values() if isinstance(value, Tensor))


def build(key: Key, *, compile: bool) -> Case:
    operator = ops.OPERATORS[key.name]
    op, spec, dtype = operator.op, operator.op.spec, getattr(torch, key.dtype)
    sizes = sizes_of(spec)[key.sizes]
    first = spec.inputs(sizes, dtype, key.device)
    given = [first, *rotated(spec, first)]
    formula = op.direct("torch")
    ways: dict[str, Callable[..., Any]] = {OURS: op, "eager": spec.reference, "torch": formula}
    if key.direction == "forward":
        prepared = {way: partial(_forward, run, given) for way, run in ways.items()}
        if dtype != torch.float32:
            prepared["reference"] = lambda: _forward(spec.reference, [in_float32(each) for each in given])
        if compile:
            prepared["compiled"] = lambda: _compiled(formula, given)
        for bound in BOUNDS.get(key.name, ()):
            if key.device.split(":")[0] in bound.devices:
                prepared[bound.name] = partial(_prepared, bound.prepare, given)
        prepared |= {
            name: partial(_prepared, prepare, given) for name, prepare in packages.ways(key.name, first).items()
        }
        flop, moved = spec.flops(**first), spec.bytes(first, _result(op, first))
    else:
        names = spec.differentiable
        if dtype != torch.float32:
            ways["reference"] = spec.reference
        if compile:
            ways["compiled"] = torch.compile(formula, dynamic=False)
        prepared = {
            way: partial(
                _with_gradients,
                run,
                [in_float32(each) for each in given] if way == "reference" else given,
                names,
                key.direction,
            )
            for way, run in ways.items()
        }
        # The backward pass has two products for each of the forward pass, and about as much more traffic.
        factor = {"backward": 2, "both": 3}[key.direction]
        flop, moved = factor * spec.flops(**first), factor * spec.bytes(first, _result(op, first))
    backend = op.explain(*first.values()).chosen or ""
    return Case(key, prepared, flop, moved, lambda: check(key, first), backend)


def rotated(spec: Spec, first: Arguments) -> list[Arguments]:
    """Copies of the arguments elsewhere in memory. Weights are shared, and packed as the model packs them."""
    count = math.ceil(ROTATED_BYTES / max(spec.bytes(first, ()), 1))
    others = [{name: _elsewhere(value) for name, value in first.items()} for _ in range(1, min(MAX_INPUTS, count))]
    for name in first:
        if name.endswith("weight"):
            for other in others:
                other[name] = first[name]
            if isinstance(first[name], Tensor) and first[name].dim() == 2:
                ops.pack_weight(first[name], ROWS)
    return others


def _elsewhere(value: Any) -> Any:
    """A copy with the same strides."""
    if not isinstance(value, Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return copy.copy_(value)


def check(key: Key, arguments: Arguments) -> Agreement:
    """Compares results or gradients with float64, beside eager code in the same dtype."""
    operator = ops.OPERATORS[key.name]
    spec = operator.op.spec
    floor = spec.floor(arguments, getattr(torch, key.dtype))
    if key.direction == "forward":
        exact = spec.reference(**arguments, upcast=True)
        with torch.no_grad(), ops.strict():
            ours = _result(operator.op, arguments)
        return agreement(ours, exact, spec.reference(*arguments.values()), floor)
    ours, exact, eager = (
        gradients(run, arguments, spec.differentiable)
        for run in (operator.op, partial(spec.reference, upcast=True), spec.reference)
    )
    return agreement(ours, exact, eager, floor)


def gradients(run: Callable[..., Any], arguments: Arguments, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    leaves = _leaves(arguments, names)
    outputs = _outputs(run, leaves)
    return _gradients(_asked(leaves, names), _random_like(outputs), *outputs)


def _result(op: Callable[..., Any], arguments: Arguments) -> Any:
    with torch.no_grad():
        return op(*arguments.values())


def _no_grad(run: Callable[..., Any], *values: Any) -> Any:
    with torch.no_grad():
        return run(*values)


def _forward(run: Callable[..., Any], given: list[Arguments]) -> list[Call]:
    return [Call(partial(_no_grad, run, *arguments.values())) for arguments in given]


def _prepared(prepare: Callable[[Arguments], Callable[[], Any]], given: list[Arguments]) -> list[Call]:
    return [Call(partial(_no_grad, prepare(arguments))) for arguments in given]


def _compiled(formula: Callable[..., Any], given: list[Arguments]) -> list[Call]:
    peer = compiled.prepare(formula, given[0])
    return [Call(partial(_no_grad, peer, *compiled.inputs(arguments))) for arguments in given]


def _with_gradients(
    run: Callable[..., Any], given: list[Arguments], names: tuple[str, ...], direction: str
) -> list[Call]:
    calls = []
    for arguments in given:
        leaves = _leaves(arguments, names)
        grads = _random_like(_differentiable(run(*leaves.values())))
        forward = partial(_outputs, run, leaves)
        backward = partial(_gradients, _asked(leaves, names), grads)
        calls.append(Call(backward, forward) if direction == "backward" else Call(partial(_both, forward, backward)))
    return calls


def _outputs(run: Callable[..., Any], leaves: Arguments) -> tuple[Tensor, ...]:
    return _differentiable(run(*leaves.values()))


def _gradients(asked: list[Tensor], grads: list[Tensor], *outputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, asked, grads)


def _both(forward: Callable[[], Any], backward: Callable[..., Any]) -> Any:
    return backward(*forward())


def _differentiable(result: Any) -> tuple[Tensor, ...]:
    return tuple(each for each in (result if isinstance(result, tuple) else (result,)) if each.requires_grad)


def _random_like(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(each.shape, generator=generator).to(each) for each in outputs]


def _leaves(arguments: Arguments, names: tuple[str, ...]) -> Arguments:
    return {
        name: value.detach().requires_grad_() if name in names and isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def _asked(leaves: Mapping[str, Any], names: tuple[str, ...]) -> list[Tensor]:
    return [leaves[name] for name in names if isinstance(leaves[name], Tensor)]


def in_float32(arguments: Arguments) -> Arguments:
    def wide(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float32
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: wide(value) for name, value in arguments.items()}
