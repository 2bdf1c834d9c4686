"""Trials: whether a module computes on small random inputs what its structure suggests.

Structure cannot show what a `forward` does. During a trial the parameters are random, in float32 and on the CPU: a zero
weight, such as that of a new up-projection, would hide what comes before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.acceleration.swap import Unsuitable

TOLERANCE = 2e-5
"""Relative, in float32: a tenth of the difference between the two forms of GELU."""

_POOL = 1048573  # prime, so that no two rows of a larger tensor are equal


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def padding(batch: int, keys: int) -> Tensor:
    """An additive mask `(batch, 1, 1, keys)` that hides the last key of the last row."""
    mask = torch.zeros(batch, 1, 1, keys, device="cpu")
    mask[-1, ..., -1] = -10000.0
    return mask


@contextmanager
def conditions(module: nn.Module) -> Iterator[None]:
    """Sets evaluation mode, no gradients, no autocast and random float32 parameters, and undoes it afterwards."""
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
    """Random values for parameters. A shared parameter gets one value."""

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
        if len(shape) < 2:  # a bias, or a norm's weight; both work with these values
            return 0.2 * values + 0.5
        return values * (1.5 / math.sqrt(math.prod(shape[1:])))


def _on_cpu(buffer: Tensor) -> Tensor:
    if buffer.is_meta:
        raise Unsuitable("it has a buffer on the meta device; accelerate the model after loading")
    return buffer.detach().to("cpu", torch.float32 if buffer.is_floating_point() else None)


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function. Raises `Unsuitable` if it fails."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        text = " ".join(str(error).split())[:120]
        raise Unsuitable(f"it fails on a trial input: {type(error).__name__}: {text}") from error


def agree(expected: Any, actual: Any, without: Tensor | None = None) -> bool:
    """Whether two results have the same form and agree up to rounding, relative to `expected - without`."""
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


def activation_of(
    function: Callable[[Tensor], Tensor], known: Mapping[str, Callable[[Tensor], Tensor]], *layers: nn.Linear
) -> Any:
    """The name of the known activation that a function applies after the first of its linear layers; others follow.

    Raises:
        Unsuitable: it applies another one.
    """
    x = random(64, layers[0].in_features) * 2.5  # the forms of GELU differ most at 2.5
    expected = outcome(function, x)
    for name, activation in known.items():
        out = activation(F.linear(x, layers[0].weight, layers[0].bias))
        for layer in layers[1:]:
            out = F.linear(out, layer.weight, layer.bias)
        if agree(expected, out):
            return name
    raise Unsuitable(f"its activation is none of {', '.join(known)}")
