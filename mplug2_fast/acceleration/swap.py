"""Changing one module instance: its class becomes a subclass of that class which computes the same, faster.

The instance stays the same object, with its parameters, buffers, children, hooks and attributes. The subclass has the
name and the signature of the original. Optimizers, state dicts, `isinstance` and code that looks up classes by name
notice nothing. Giving the class back undoes the swap.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.acceleration.cache import Session
from mplug2_fast.acceleration.gain import Size
from mplug2_fast.acceleration.report import Calls
from mplug2_fast.ops import unpack_weight

STATE = "_mplug2_fast"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (Tensor, nn.Parameter)
_PLAIN_OR_NONE = frozenset((*_PLAIN, type(None)))

_is_compiling = torch.compiler.is_compiling
_is_traced = torch._C._get_tracing_state
_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_forward_ad = torch.autograd.forward_ad


class Unsuitable(Exception):
    """Why a module is left as it is."""


class Unserved(Exception):
    """Why a swapped module leaves a call to the original's code."""


@dataclass(frozen=True)
class Part:
    """A module, and what it was when the module around it was swapped."""

    module: nn.Module
    kind: type[nn.Module]
    children: tuple[nn.Module | None, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Part:
        return cls(module, type(module), tuple(module._modules.values()))

    def __reduce__(self) -> Any:  # the classes of swapped modules cannot be pickled
        return Part._again, (self.module, self.children)

    @classmethod
    def _again(cls, module: nn.Module, children: tuple[nn.Module | None, ...]) -> Part:
        return cls(module, type(module), children)


@dataclass
class State:
    """What a swapped module keeps.

    Attributes:
        found: what recognition found out about it; of the kind's own type.
        size: what decides from which input on it gains.
        least: elements of an input that are too few to gain, whatever their type.
        session: the caches of the decoder that it belongs to, if it belongs to one.
        parts: the module and all modules inside it that the fast forward does without.
        dropouts: those of the parts that may draw random numbers.
        batch_norms: those of the parts that take statistics of the batch in training.
        by_parts: whether modules inside it are swapped too, and compute where it does not serve a call.
        calls: what became of its calls.
        inside: whether it is a part of another swapped module, which gives the warnings.
        warned: reasons that were given in a warning.
    """

    found: Any
    size: Size | None = None
    least: int = 0
    session: Session | None = None
    parts: tuple[Part, ...] = ()
    dropouts: tuple[nn.Module, ...] = ()
    batch_norms: tuple[nn.Module, ...] = ()
    by_parts: bool = False
    inside: bool = False
    calls: Calls = field(default_factory=Calls)
    warned: set[str] = field(default_factory=set)

    def know(self, parts: tuple[nn.Module, ...], inside: bool) -> None:
        """Notes the parts as they are now."""
        self.inside = inside
        self.parts = tuple(map(Part.of, parts))
        self.dropouts = tuple(p for p in parts if isinstance(p, (nn.modules.dropout._DropoutNd, nn.MultiheadAttention)))
        self.batch_norms = tuple(p for p in parts if isinstance(p, nn.modules.batchnorm._BatchNorm))
        self.by_parts = any(isinstance(part, Swapped) for part in parts[1:])


class Kind:
    """A kind of module that is known: how it is recognised, and how it is computed. A namespace, without instances."""

    runs_original = False
    """Whether `forward` runs the original's code, and only prepares it."""

    is_faster_in_training = False
    """Whether it is faster than the original on a CPU where gradients are needed."""

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        """Whether the module is to be taken for this kind at all."""
        raise NotImplementedError

    @staticmethod
    def recognise(module: nn.Module) -> Any:
        """What `forward` needs to know of the module. Raises `Unsuitable` where it computes something else."""
        raise NotImplementedError

    @staticmethod
    def weight(module: Any) -> Tensor | None:
        """The weight whose size decides from which input on the module gains, if it has one."""
        return None

    @staticmethod
    def least(size: Size | None) -> int:
        """Elements of the first argument that are too few to gain, whatever their type. It is asked first."""
        return 0

    @staticmethod
    def pays(state: Any, x: Tensor) -> bool:
        """Whether `forward` is faster than the original's for a first argument of this size and type."""
        return True

    @staticmethod
    def forward(module: Any, state: State, *args: Any, **kwargs: Any) -> Any:
        """The original's forward. Raises `Unserved` before it has done anything."""
        raise NotImplementedError


class Swapped:
    """What is mixed into the class of a module that is swapped."""

    _mplug2_fast_kind: type[Kind]
    _mplug2_fast_original: type[nn.Module]

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
    attributes = {
        "_mplug2_fast_kind": kind,
        "_mplug2_fast_original": original,
        "forward": _forward_of(kind, original),
        **{name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")},
    }
    return type(original.__name__, (Swapped, original), attributes)


def _forward_of(kind: type[Kind], original: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a swapped module. A call that is not served goes to the original's, as do all calls that torch
    records, transforms or compiles."""
    plain = original.forward
    first = next(iter(list(inspect.signature(plain).parameters)[1:2]), "")
    pays = kind.pays

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling() or _is_traced() is not None:
            return plain(self, *args, **kwargs)
        state = self.__dict__[STATE]
        x = args[0] if args else kwargs.get(first)
        if type(x) in _PLAIN:
            if x.numel() < state.least or not pays(state, x):
                state.calls.no_gain += 1
                return plain(self, *args, **kwargs)
        elif not kind.runs_original:
            state.calls.left(f"its input is a {type(x).__name__}", state.by_parts)
            return plain(self, *args, **kwargs)
        reason = _why_not(kind, state, x)
        if not reason:
            try:
                _require_intact(self, state)
                result = kind.forward(self, state, *args, **kwargs)
            except Unserved as why:
                reason = str(why)
                _warn(self, state, reason)
            else:
                state.calls.served += not kind.runs_original  # those count by themselves
                return result
        state.calls.left(reason, state.by_parts)
        return plain(self, *args, **kwargs)

    return forward


def _warn(module: Any, state: State, reason: str) -> None:
    if reason not in state.warned and not state.inside:
        state.warned.add(reason)
        parts = ", with accelerated parts" if state.by_parts else ""
        warnings.warn(f"{type(module).__name__}: {reason}. The original's code computes{parts}.", RuntimeWarning, 3)


def _why_not(kind: type[Kind], state: State, x: Any) -> str:
    """Why the original's code is to run, though nobody made a mistake. Empty where nothing speaks against serving."""
    if _modes() or _transforms() is not None or _forward_ad._current_level >= 0:
        return "a mode or transform of torch is in force"
    if kind.runs_original:
        return ""
    if not (x.is_cpu or x.is_cuda):
        return f"it is on the device {x.device.type}"
    if any(norm.training for norm in state.batch_norms):
        return "batch norm is in training"
    wanted = torch.is_grad_enabled()
    needs_grad = wanted and x.requires_grad
    for part in state.parts:
        for parameter in part.module._parameters.values():
            if type(parameter) not in _PLAIN_OR_NONE:
                return f"a weight is a {type(parameter).__name__}"
            if wanted and parameter is not None and parameter.requires_grad:
                needs_grad = True
    if x.is_cpu:
        if needs_grad and not kind.is_faster_in_training:
            return "no gain with gradients"
        # A recomputed forward, which has gradients, must draw what this one draws.
        if any(part.training and _probability(part) > 0 for part in state.dropouts):
            return "dropout is on"
    return ""


def _probability(part: Any) -> float:
    return part.dropout if isinstance(part, nn.MultiheadAttention) else part.p


def swap(module: nn.Module, kind: type[Kind], found: Any, session: Session | None) -> None:
    """Raises `Unsuitable` for an instance whose class cannot be changed."""
    original = type(module)
    new = _subclass(kind, original)
    try:
        module.__class__ = new
    except TypeError as error:
        raise Unsuitable(f"its class cannot be changed: {error}") from error
    weight = kind.weight(module)
    size = None if weight is None else Size.of(weight)
    vars(module)[STATE] = State(found, size, kind.least(size), session)
    _replace_in_wrapper(module, original.forward, new.forward)


def unswap(module: nn.Module) -> None:
    state = vars(module).pop(STATE)
    now: Any = type(module)
    new = next(cls for cls in now.__mro__ if Swapped in cls.__bases__)
    original = new._mplug2_fast_original
    module.__class__ = original if now is new else _rebased(now, new, original)
    _replace_in_wrapper(module, new.forward, original.forward)
    if state.session is not None:
        state.session.drop()
    for parameter in module.parameters():
        unpack_weight(parameter)


def _rebased(cls: Any, old: type, new: type) -> Any:
    """A class that was made from `old` later on, as FSDP and parametrisations do, made from `new` instead."""
    bases = tuple(new if base is old else base for base in cls.__bases__)
    return type(cls)(cls.__name__, bases, {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")})


# --- forwards that a wrapper put on the instance


def wrapper_of(module: nn.Module) -> functools.partial[Any] | None:
    """The wrapper on an instance that calls the forward of its class, as fairscale's `checkpoint_wrapper` makes it: a
    `functools.partial` of that function and a weak reference to the module."""
    own = vars(module).get("forward")
    if not isinstance(own, functools.partial) or type(module).forward not in own.args:
        return None
    refers = any(isinstance(value, weakref.ref) and value() is module for value in own.args)
    return own if refers else None


def _replace_in_wrapper(module: nn.Module, old: Any, new: Any) -> None:
    own = vars(module).get("forward")
    if isinstance(own, functools.partial) and old in own.args:
        args = (new if value is old else value for value in own.args)
        vars(module)["forward"] = functools.partial(own.func, *args, **own.keywords)


# --- parts


def inner(module: nn.Module) -> tuple[nn.Module, ...]:
    """The modules inside a module, itself left out."""
    return tuple(module.modules())[1:]


def hooked(modules: tuple[nn.Module, ...]) -> Iterator[nn.Module]:
    """Those that something watches or has changed: hooks, or a forward of the instance's own."""
    for module in modules:
        own = vars(module)
        if "forward" in own or any(own[hooks] for hooks in _HOOKS):
            yield module


def require_plain_weights(module: nn.Module) -> None:
    """Raises `Unsuitable` for weights that are tensors of a subclass: quantised, sharded, or recorded."""
    for name, parameter in module.named_parameters():
        if type(parameter) not in _PLAIN:
            raise Unsuitable(f"{name} is a {type(parameter).__name__}")


def _require_intact(module: nn.Module, state: State) -> None:
    """Raises `Unserved` where the parts that a fast forward passes by are no longer those that were recognised."""
    parts = state.parts
    for part in parts:
        if type(part.module) is not part.kind and part.module is not module:
            raise Unserved("modules inside it were replaced since it was accelerated")
        if tuple(part.module._modules.values()) != part.children:
            raise Unserved("modules inside it were replaced since it was accelerated")
    if len(parts) < 2:
        return
    if torch.nn.modules.module._has_any_global_hook():
        raise Unserved("hooks on all modules are in force")
    for part in parts[1:]:
        own = part.module.__dict__
        if "forward" in own or any(own[hooks] for hooks in _HOOKS):
            raise Unserved(f"a hook, or a forward of the instance's own, is on {name_of(part.module, module)}")


def name_of(part: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in module.named_modules() if found is part)
