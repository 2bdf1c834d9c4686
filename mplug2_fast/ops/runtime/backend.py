"""Backends: one way each to compute an operator, and the contexts that choose among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mplug2_fast.ops.runtime import packages

BACKENDS = ("cpu", "cuda", "triton", *packages.BACKENDS, "torch", "reference")
"""Backend names, in the order in which an operator tries those that it has. "reference" runs only if forced."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an operator. The functions take `Arguments`, the operator's NamedTuple.

    Attributes:
        name: one of `BACKENDS`.
        run: computes the results.
        not_supported_reasons: one sentence for each reason why `run` cannot serve the arguments; empty if it can.
        devices: the device types that it supports; empty for any.
        differentiable: whether autograd can follow `run`. If not, gradients come from `backward`, or without one from
            the "torch" backend's formula, computed again.
        backward: `(grads, arguments, saved, needs)` to the gradients that `needs` selects among the differentiable
            arguments, in order. `grads` are those of the results, None for zeros. `saved` is what `train` filled, after
            the results if the operator's backward reads them.
        buffers: allocates the tensors that `train` fills.
        train: `(arguments, buffers)` to the results; fills the buffers. None if the backward needs nothing saved.
        slower_reasons: `(needs_grad, arguments)` to reasons why a later backend is faster, though `run` could serve.
            Ignored if a backend is forced.
    """

    name: str
    run: Callable[[Any], Any]
    not_supported_reasons: Callable[[Any], Sequence[str]] = lambda _: ()
    devices: tuple[str, ...] = ()
    differentiable: bool = False
    backward: Callable[[list[Tensor | None], Any, list[Tensor], list[bool]], list[Tensor]] | None = None
    buffers: Callable[[Any], list[Tensor]] = lambda _: []
    train: Callable[[Any, list[Tensor]], Any] | None = None
    slower_reasons: Callable[[bool, Any], Sequence[str]] | None = None

    @property
    def trains(self) -> bool:
        """Whether it gives gradients without computing the formula again."""
        return self.differentiable or self.backward is not None


_forced: ContextVar[str | None] = ContextVar("mplug2_fast_backend", default=None)
_strict: ContextVar[bool] = ContextVar("mplug2_fast_strict", default=False)

forced = _forced.get
"""The name that `use_backend` set here, or None."""
is_strict = _strict.get
"""Whether `strict` is active here."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the context every operator runs on this backend or raises `BackendError`. Other threads and asyncio tasks
    are not affected.

    Args:
        name: "cpu" (native kernels and oneDNN), "cuda" (native kernels for compute capability 9.0), "triton",
            "flash_attn", "xformers" or "apex" (those packages, if installed), "torch" (PyTorch's operators, on any
            device) or "reference" (plain eager code).

    Raises:
        ValueError: unknown backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose from {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def strict() -> Iterator[None]:
    """Inside the context an operator raises `BackendError` instead of falling back to a backend that was not written
    for the device. Other threads and asyncio tasks are not affected."""
    token = _strict.set(True)
    try:
        yield
    finally:
        _strict.reset(token)


def forced_while_compiling() -> str | None:
    """`forced` as a constant of the compiled graph."""
    return forced()


# What torch.compiler.assume_constant_result does. That function imports the whole compiler and Triton first, which
# takes half of the time of importing this package.
forced_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]
