"""Changing one module instance: its class becomes a subclass of that class which computes the same, faster.

The instance stays the same object, with its parameters, buffers, children, hooks and attributes: optimizers, state
dicts, aliases and `isinstance` notice nothing, and undoing it is giving the class back.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mplug2_fast.acceleration.cache import Session
from mplug2_fast.ops import unpack_weight

STATE = "_mplug2_fast"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unsuitable(Exception):
    """Why a module is left as it is."""


class Unserved(Exception):
    """Why a swapped module leaves a call to the original's code."""


@dataclass
class State:
    """What a swapped module keeps.

    Attributes:
        found: what recognition found out about it; of the kind's own type.
        parts: the modules inside it when it was swapped.
        session: the caches of the decoder that it belongs to, if it belongs to one.
    """

    found: Any
    parts: tuple[nn.Module, ...]
    session: Session | None = None


class Kind:
    """A kind of module that is known: how it is recognised, and how it is computed. A namespace, without instances."""

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        """Whether the module is to be taken for this kind at all."""
        raise NotImplementedError

    @staticmethod
    def recognise(module: nn.Module) -> Any:
        """What `forward` needs to know of the module. Raises `Unsuitable` where it computes something else."""
        raise NotImplementedError

    @staticmethod
    def forward(module: Any, state: State, *args: Any, **kwargs: Any) -> Any:
        """The original's forward. Raises `Unserved` before it has done anything."""
        raise NotImplementedError


class Swapped:
    """What is mixed into the class of a module that is swapped."""

    _mplug2_fast_kind: type[Kind]
    _mplug2_fast_original: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            if not torch.compiler.is_compiling():
                require_intact(self)  # type: ignore[arg-type]
            return self._mplug2_fast_kind.forward(self, vars(self)[STATE], *args, **kwargs)
        except Unserved as reason:
            warnings.warn(f"{type(self).__name__}: {reason}. The original's code computes.", RuntimeWarning, 2)
        return original_forward(self, *args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        state = vars(self)[STATE]
        if mode and state.session is not None:
            state.session.drop()
        return super().train(mode)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (self._mplug2_fast_kind, self._mplug2_fast_original), vars(self)


def original_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What a swapped module's forward was before."""
    return module._mplug2_fast_original.forward(module, *args, **kwargs)


def _revive(kind: type[Kind], original: type[nn.Module]) -> nn.Module:
    new = _subclass(kind, original)
    return new.__new__(new)


@functools.cache
def _subclass(kind: type[Kind], original: type[nn.Module]) -> type[nn.Module]:
    attributes = {"_mplug2_fast_kind": kind, "_mplug2_fast_original": original, "__doc__": kind.__doc__}
    return type(f"Fast{original.__name__}", (Swapped, original), attributes)


def swap(module: nn.Module, kind: type[Kind], found: Any, session: Session | None) -> None:
    """Raises `Unsuitable` for an instance whose class cannot be changed."""
    try:
        module.__class__ = _subclass(kind, type(module))
    except TypeError as error:
        raise Unsuitable(f"its class cannot be changed: {error}") from error
    vars(module)[STATE] = State(found, inner(module), session)


def unswap(module: nn.Module) -> None:
    state = vars(module).pop(STATE)
    module.__class__ = type(module)._mplug2_fast_original  # type: ignore[attr-defined]
    if state.session is not None:
        state.session.drop()
    for parameter in module.parameters():
        unpack_weight(parameter)


def inner(module: nn.Module) -> tuple[nn.Module, ...]:
    """The modules inside a module, itself left out."""
    return tuple(module.modules())[1:]


def hooked(modules: tuple[nn.Module, ...]) -> Iterator[nn.Module]:
    """Those that something watches or has changed: hooks, or a forward of the instance's own."""
    for module in modules:
        own = vars(module)
        if "forward" in own or any(own[hooks] for hooks in _HOOKS):
            yield module


def require_intact(module: nn.Module) -> None:
    """Raises `Unserved` where the parts that a fast forward passes by are no longer those that were recognised."""
    parts = vars(module)[STATE].parts
    if not parts:
        return
    now = inner(module)
    if len(parts) != len(now) or any(a is not b for a, b in zip(parts, now, strict=True)):
        raise Unserved("modules inside it were replaced since it was accelerated")
    if torch.nn.modules.module._has_any_global_hook():
        raise Unserved("hooks on all modules are in force")
    for part in hooked(parts):
        raise Unserved(f"a hook, or a forward of the instance's own, is on {name_of(part, module)}")


def name_of(part: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in module.named_modules() if found is part)
