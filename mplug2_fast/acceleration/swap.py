"""Changes one module instance: its class becomes a subclass of its class that computes the same, faster.

The instance stays the same object, with its parameters, buffers, children, hooks and attributes. The subclass has the
name and the signature of the original, so optimizers, state dicts, `isinstance` and code that looks up classes by name
work as before. Restoring the class undoes the swap.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.acceleration import gain, int8
from mplug2_fast.acceleration.cache import Call, Session
from mplug2_fast.acceleration.report import Calls
from mplug2_fast.acceleration.small import STATE, connected, small_calls
from mplug2_fast.ops import unpack_weight

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (Tensor, nn.Parameter)
_PLAIN_OR_NONE = frozenset((*_PLAIN, type(None)))

_is_compiling, _is_dynamo = torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling
_is_traced, _is_grad_enabled = torch._C._get_tracing_state, torch.is_grad_enabled
_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_forward_ad = torch.autograd.forward_ad

HOOKED = "{} has a hook or its own forward"
"""Why a fast forward may not replace the call of this part."""


class Unsuitable(Exception):
    """Why a module is left as it is."""


class Unserved(Exception):
    """Why the original code of a swapped module must run a call."""


@dataclass(frozen=True)
class Part:
    """A module inside a swapped one, as it was at the swap."""

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
class Last:
    """What swapped modules of a model did last.

    Attributes:
        flags: one, whether the last small call of a linear layer had too many rows for the kernel for few rows.
    """

    flags: bytearray = field(default_factory=lambda: bytearray(1))


@dataclass
class State:
    """What is known about a swapped module.

    Attributes:
        found: the result of recognition; its type depends on the kind.
        size: of the weight that decides which inputs are large enough.
        int8: whether it has 8-bit weights.
        too_small: inputs that are known to be too small.
        small: calls with such inputs, as `small.small_calls` makes it.
        session: the caches of the decoder that the module belongs to, if any.
        last: shared by the modules of a model.
        parts: the module and all modules inside it that the fast forward replaces.
        dropouts: the parts that may draw random numbers.
        batch_norms: the parts that use batch statistics in training.
        by_parts: whether modules inside it are swapped too, so that the original code runs with accelerated parts.
        inside: whether it is a part of another swapped module, which gives the warnings.
        calls: counts of its calls.
        unserved: reasons of calls that were not served. Each is given in one warning.
    """

    found: Any
    size: gain.Size | None
    too_small: gain.TooSmall
    session: Session | None
    last: Last
    parts: tuple[Part, ...] = ()
    dropouts: tuple[nn.Module, ...] = ()
    batch_norms: tuple[nn.Module, ...] = ()
    by_parts: bool = False
    int8: bool = False
    inside: bool = False
    calls: Calls = field(default_factory=Calls)
    unserved: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._count_small_calls()

    def __getstate__(self) -> dict[str, Any]:  # copies start at zero, and native objects cannot be pickled
        return {name: value for name, value in vars(self).items() if name != "small"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._count_small_calls()

    def _count_small_calls(self) -> None:
        self.small = self.calls.small = small_calls(self.too_small, self.last.flags)

    def use_int8(self, kind: type[Kind], used: bool = True) -> None:
        """Serves calls that are large enough for 8-bit weights, or no longer."""
        self.int8, self.too_small = used and self.size is not None, kind.too_small(self.size)
        if self.int8:
            self.too_small = gain.small_for_int8(self.too_small, self.size)
        self._count_small_calls()

    def record(self, parts: tuple[nn.Module, ...], inside: bool) -> None:
        """Records the parts as they are now."""
        self.inside = inside
        self.parts = tuple(map(Part.of, parts))
        self.dropouts = tuple(p for p in parts if isinstance(p, (nn.modules.dropout._DropoutNd, nn.MultiheadAttention)))
        self.batch_norms = tuple(p for p in parts if isinstance(p, nn.modules.batchnorm._BatchNorm))
        self.by_parts = any(isinstance(part, Swapped) for part in parts[1:])

    def require_no_dropout(self) -> None:
        """Raises `Unserved` while a dropout inside is on."""
        if any(part.training and part.p > 0 for part in self.dropouts):
            raise Unserved("dropout is on")


class Kind:
    """A kind of module that can be accelerated: how to recognise it and how to compute it. Never instantiated."""

    runs_original = False
    """Whether `forward` runs the original code and only prepares it."""

    reuses_calls = False
    """Whether small calls win while the session has a current call."""

    is_faster_in_training = False
    """Whether `forward` is faster than the original on a CPU with gradients."""

    @classmethod
    def replacement(cls) -> str:
        """What a report calls the fast module."""
        return f"Fast{cls.__name__.removesuffix('Kind')}"

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        """Whether the module has the structure of this kind."""
        raise NotImplementedError

    @staticmethod
    def recognise(module: nn.Module) -> Any:
        """Returns what `forward` needs to know about the module. Raises `Unsuitable` if it computes something else."""
        raise NotImplementedError

    @staticmethod
    def weight(module: Any) -> Tensor | None:
        """The weight whose size decides which inputs are large enough, if there is one."""
        return None

    @staticmethod
    def quick(original: type[nn.Module]) -> str:
        """The native function that computes small calls as the original class does, if there is one."""
        return ""

    @staticmethod
    def products(module: Any, found: Any) -> dict[str, tuple[nn.Module, Tensor]]:
        """The linear layers that no part inside computes: name -> the module that has the weight, and the weight."""
        return {}

    @classmethod
    def too_small(cls, size: gain.Size | None) -> gain.TooSmall:
        """First arguments that are too small. This cheap check comes before `pays`."""
        return gain.TooSmall()

    @staticmethod
    def refusal(state: Any, kwargs: Mapping[str, Any]) -> str:
        """Why `forward` will raise `Unserved`, if the keywords show it. Empty otherwise."""
        return ""

    @classmethod
    def pays(cls, state: Any, x: Tensor) -> bool:
        """Whether `forward` is faster than the original for a first argument of this size and type."""
        return True

    @staticmethod
    def forward(module: Any, state: State, *args: Any, **kwargs: Any) -> Any:
        """Replaces the original forward. Raises `Unserved` before it changes anything."""
        raise NotImplementedError


class ProductKind(Kind):
    """A kind whose cost is its matrix products."""

    is_fused = True
    """Whether the products have an activation or a residual."""

    @classmethod
    def too_small(cls, size: gain.Size) -> gain.TooSmall:
        return gain.small_for_product(size)

    @classmethod
    def pays(cls, state: State, x: Tensor) -> bool:
        return gain.of_product(x, state.size, fused=cls.is_fused)


class DecoderPartKind(ProductKind):
    """A kind that may be part of a decoder, where small calls win by reusing what earlier calls computed."""

    reuses_calls = True

    @classmethod
    def pays(cls, state: State, x: Tensor) -> bool:
        return x.is_cuda or Call.current(state.session) is not None or super().pays(state, x)


class Swapped:
    """Mixed into the class of a swapped module."""

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
    """Runs the forward that a swapped module had before."""
    return module._mplug2_fast_original.forward(module, *args, **kwargs)


def _revive(kind: type[Kind], original: type[nn.Module]) -> nn.Module:
    new = _subclass(kind, original)
    return new.__new__(new)


@functools.cache
def _subclass(kind: type[Kind], original: type[nn.Module]) -> type[nn.Module]:
    attributes = {
        "_mplug2_fast_kind": kind,
        "_mplug2_fast_original": original,
        **{name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")},
    }
    new: Any = type(original.__name__, (Swapped, original), attributes)
    new.forward = _forward_of(kind, original)
    quick = kind.quick(original)
    if quick and connected() is not None:
        new.forward = _quick_forward_of(getattr(connected(), quick), original, new, new.forward)
    return new


def _forward_of(kind: type[Kind], original: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a swapped module. The original forward runs the calls that are not served, and all calls that
    torch records, transforms or compiles."""
    plain = original.forward
    first = next(iter(list(inspect.signature(plain).parameters)[1:2]), "")
    pays, reuses = kind.pays, kind.reuses_calls

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_dynamo():
            return plain(self, *args, **kwargs)
        state = self.__dict__[STATE]
        x = args[0] if args else kwargs.get(first)
        cached = reuses and state.session is not None and Call.current(state.session) is not None
        if not cached and state.small.add(x):
            return plain(self, *args, **kwargs)
        if _is_traced() is not None or _is_compiling():
            return plain(self, *args, **kwargs)
        if type(x) in _PLAIN:
            if not (pays(state, x) or (state.int8 and gain.of_int8(x, state.size))):
                state.small.count += 1
                return plain(self, *args, **kwargs)
        elif not kind.runs_original:
            state.calls.left(f"its input is a {type(x).__name__}", state.by_parts)
            return plain(self, *args, **kwargs)
        if not _is_grad_enabled() and (reason := kind.refusal(state, kwargs)) in state.unserved:
            state.calls.left(reason, state.by_parts)
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
                state.calls.served += not kind.runs_original  # these count their own calls
                return result
        state.calls.left(reason, state.by_parts)
        return plain(self, *args, **kwargs)

    return forward


def _quick_forward_of(
    compute_small: Callable[..., Tensor | None],
    original: type[nn.Module],
    swapped: type[nn.Module],
    usual: Callable[..., Any],
) -> Callable[..., Any]:
    """The forward of a swapped module with one argument, a weight and a bias, whose small calls are native."""
    plain = original.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_dynamo():
            return plain(self, *args, **kwargs)
        result = compute_small(self, args[0], swapped) if len(args) == 1 and not kwargs else None
        return usual(self, *args, **kwargs) if result is None else result

    def forward_input(self: Any, input: Any) -> Any:  # faster, and has the argument's name in PyTorch's classes
        if _is_dynamo():
            return plain(self, input)
        result = compute_small(self, input, swapped)
        return usual(self, input) if result is None else result

    return functools.wraps(plain)(
        forward_input if [*inspect.signature(plain).parameters] == ["self", "input"] else forward
    )


def _warn(module: Any, state: State, reason: str) -> None:
    if reason in state.unserved:
        return
    state.unserved.add(reason)
    if not state.inside:
        parts = ", with accelerated parts" if state.by_parts else ""
        warnings.warn(f"{type(module).__name__}: {reason}. The original code runs{parts}.", RuntimeWarning, 3)


def _why_not(kind: type[Kind], state: State, x: Any) -> str:
    """Why the original code must run a call that deserves no warning. Empty if the call can be served."""
    if _modes() or _transforms() is not None or _forward_ad._current_level >= 0:
        return "a torch mode or transform is active"
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
        # A forward that is recomputed for gradients must draw the same random numbers.
        if any(part.training and _probability(part) > 0 for part in state.dropouts):
            return "dropout is on"
    return ""


def _probability(part: Any) -> float:
    return part.dropout if isinstance(part, nn.MultiheadAttention) else part.p


def swap(module: nn.Module, kind: type[Kind], found: Any, session: Session | None, last: Last) -> None:
    """Raises `Unsuitable` for an instance whose class cannot be changed."""
    original = type(module)
    new = _subclass(kind, original)
    try:
        module.__class__ = new
    except TypeError as error:
        raise Unsuitable(f"its class cannot be changed: {error}") from error
    weight = kind.weight(module)
    size = None if weight is None else gain.Size.of(weight)
    vars(module)[STATE] = State(found, size, kind.too_small(size), session, last)
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
    for part in module.modules():
        if not isinstance(part, Swapped):  # others have their own weights
            int8.remove(part)


def _rebased(cls: Any, old: type, new: type) -> Any:
    """Rebuilds a class that was derived from `old`, as FSDP and parametrisations do, on `new`."""
    bases = tuple(new if base is old else base for base in cls.__bases__)
    return type(cls)(cls.__name__, bases, {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")})


# --- wrappers that replace forward on the instance


def wrapper_of(module: nn.Module) -> functools.partial[Any] | None:
    """A `forward` on the instance that wraps the forward of its class, as fairscale's `checkpoint_wrapper` makes it: a
    `functools.partial` with that function and a weak reference to the module."""
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
    """All modules inside a module, without itself."""
    return tuple(module.modules())[1:]


def hooked(modules: tuple[nn.Module, ...]) -> Iterator[nn.Module]:
    """Those with a hook, or with a `forward` on the instance."""
    for module in modules:
        own = vars(module)
        if "forward" in own or any(own[hooks] for hooks in _HOOKS):
            yield module


def require_plain_weights(module: nn.Module) -> None:
    """Raises `Unsuitable` for weights of a tensor subclass: quantised, sharded or recorded."""
    for name, parameter in module.named_parameters():
        if type(parameter) not in _PLAIN:
            raise Unsuitable(f"{name} is a {type(parameter).__name__}")


def _require_intact(module: nn.Module, state: State) -> None:
    """Raises `Unserved` if the parts that the fast forward replaces have changed since recognition."""
    parts = state.parts
    for part in parts:
        if type(part.module) is not part.kind and part.module is not module:
            raise Unserved("modules inside it were replaced since it was accelerated")
        if tuple(part.module._modules.values()) != part.children:
            raise Unserved("modules inside it were replaced since it was accelerated")
    if len(parts) < 2:
        return
    if torch.nn.modules.module._has_any_global_hook():
        raise Unserved("global module hooks are active")
    for part in parts[1:]:
        own = part.module.__dict__
        if "forward" in own or any(own[hooks] for hooks in _HOOKS):
            raise Unserved(HOOKED.format(name_of(part.module, module)))


def name_of(part: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in module.named_modules() if found is part)
