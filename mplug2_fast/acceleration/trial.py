"""Recognition by trial: whether a module computes what its parts let one expect, on small random inputs.

The parameters are random meanwhile, too, on the CPU and in float32, whatever and wherever the real ones are: a weight
that is zero, such as a fresh up-projection's, would hide what comes before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.acceleration.swap import Unsuitable

TOLERANCE = 2e-5
"""Relative, in float32: a tenth of what separates the two forms of GELU."""

_POOL = 1048573  # prime: no two rows of a longer tensor are alike


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def padding(batch: int, keys: int) -> Tensor:
    """An additive mask `(batch, 1, 1, keys)` that hides the last key of the last row."""
    mask = torch.zeros(batch, 1, 1, keys, device="cpu")
    mask[-1, ..., -1] = -10000.0
    return mask


@contextmanager
def conditions(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, and random float32 parameters; all of it undone afterwards."""
    parts = list(module.modules())
    training = [part.training for part in parts]
    tensors = [(dict(part._parameters), dict(part._buffers)) for part in parts]
    substitutes = _Substitutes()
    try:
        for part in parts:
            part.training = False
            part._parameters.update({k: substitutes.of(v) for k, v in part._parameters.items() if v is not None})
            part._buffers.update({k: _on_cpu(v) for k, v in part._buffers.items() if v is not None})
        with (
            torch.device("cpu"),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        for part, mode, (parameters, buffers) in zip(parts, training, tensors, strict=True):
            part.training = mode
            part._parameters.update(parameters)
            part._buffers.update(buffers)


class _Substitutes:
    """Random values in place of parameters; one value for a parameter, wherever it is."""

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}
        self._pool = random(_POOL)

    def of(self, parameter: Tensor) -> Tensor:
        if id(parameter) not in self._known:
            self._known[id(parameter)] = self._make(parameter, len(self._known))
        return self._known[id(parameter)]

    def _make(self, parameter: Tensor, index: int) -> Tensor:
        shape, start = parameter.shape, index * 104729 % _POOL
        repeats = math.ceil((start + parameter.numel()) / _POOL)
        values = self._pool.repeat(repeats)[start : start + parameter.numel()].view(shape)
        if len(shape) < 2:  # a norm's weight, or a bias: nothing here depends on which
            return 0.2 * values + 0.5
        return values * (1.5 / math.sqrt(math.prod(shape[1:])))


def _on_cpu(buffer: Tensor) -> Tensor:
    if buffer.is_meta:
        raise Unsuitable("it is on the meta device: accelerate it when it is loaded")
    return buffer.detach().to("cpu", torch.float32 if buffer.is_floating_point() else None)


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the call returns. Raises `Unsuitable` with what it raised."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        text = " ".join(str(error).split())[:120]
        raise Unsuitable(f"it does not run on a trial input: {type(error).__name__}: {text}") from error


def agree(expected: Any, actual: Any, without: Tensor | None = None) -> bool:
    """Whether two results are of one form and the same up to rounding; `without`, a residual, counts for nothing."""
    if isinstance(expected, (tuple, list)):
        return (
            isinstance(actual, type(expected))
            and len(actual) == len(expected)
            and all(agree(e, a, without) for e, a in zip(expected, actual, strict=True))
        )
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return expected is None and actual is None
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    size = expected if without is None or without.shape != expected.shape else expected - without
    return bool((expected - actual).norm() <= TOLERANCE * size.norm())


def activation_of(function: Callable[[Tensor], Tensor], known: dict[str, Callable[[Tensor], Tensor]]) -> str:
    """The name of the known activation that a function is. Raises `Unsuitable` where it is none of them."""
    x = torch.linspace(-8, 8, 4001)
    values = outcome(function, x)
    for name, candidate in known.items():
        if isinstance(values, Tensor) and values.shape == x.shape and torch.allclose(values, candidate(x), 1e-5, 1e-6):
            return name
    raise Unsuitable(f"its activation is none of {', '.join(known)}")
