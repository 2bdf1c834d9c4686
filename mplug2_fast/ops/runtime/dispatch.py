"""One operator, several backends: which one serves a call, why the others do not, and how torch sees the operator.

A call outside of `torch.compile` that needs no gradient goes straight to its backend. All others go through
`torch.ops.mplug2_fast`, where every operator NAME is registered with a fake implementation and with a backward that
knows nothing but the arguments. Where a backend has a backward of its own that wants more, NAME_train also returns what
that backend saves; NAME_backward serves both.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from mplug2_fast import _native
from mplug2_fast.errors import BackendError
from mplug2_fast.ops.runtime import flop_formulas, formula, memory, packages
from mplug2_fast.ops.runtime.spec import Spec

_F = TypeVar("_F", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("mplug2_fast", "DEF")
_CPU, _WITH_AUTOCAST = frozenset(("cpu",)), frozenset(("cpu", "cuda"))
_is_cpu = attrgetter("is_cpu")
_is_compiling, _tracing = torch.compiler.is_compiling, torch._C._get_tracing_state

_forced: ContextVar[str | None] = ContextVar("mplug2_fast_backend", default=None)
_strict: ContextVar[bool] = ContextVar("mplug2_fast_strict", default=False)

BACKENDS = ("cpu", "cuda", "triton", *packages.BACKENDS, "torch", "reference")
"""Names of backends, in the order in which dispatch tries those that an operator has; "reference" only if forced."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an operator.

    Attributes:
        name: one of `BACKENDS`.
        run: takes the operator's arguments, all of them, in order.
        not_supported_reasons: takes the same; why `run` cannot serve them, one sentence each, empty when it can.
        devices: device types that it is for; empty for any.
        differentiable: whether autograd can follow `run`. If not, gradients are those of `backward`, or without one
            those of the recomputed formula.
        backward: `(grads, arguments, saved, needs)` to the gradients of the differentiable arguments that `needs` asks
            for, in order. `grads` are those of the results, None for zeros; `saved` is what `train` filled, the results
            in front where the operator's backward reads them.
        saved: takes the arguments; empty tensors for what `train` saves.
        train: takes the arguments and those tensors, fills them, returns the results. None where nothing is saved.
        slower_reasons: takes whether gradients are asked for, and the arguments; why a backend after this one is
            faster, though `run` could serve. Counts where none is forced.
    """

    name: str
    run: Callable[..., Any]
    not_supported_reasons: Callable[..., Sequence[str]] = lambda *_: ()
    devices: tuple[str, ...] = ()
    differentiable: bool = False
    backward: Callable[[list[Tensor | None], tuple[Any, ...], list[Tensor], list[bool]], list[Tensor]] | None = None
    saved: Callable[..., list[Tensor]] | None = None
    train: Callable[..., Any] | None = None
    slower_reasons: Callable[..., Sequence[str]] | None = None

    @property
    def trains(self) -> bool:
        """Whether it gives gradients without the formula being computed again."""
        return self.differentiable or self.backward is not None


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why each of the others does not."""

    op: str
    chosen: str | None
    reasons: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {f'served by {self.chosen}' if self.chosen else 'no backend can serve this call'}"]
        lines += [f"  not {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        return "\n".join(lines)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context, of this thread or task alone, every operator runs on this backend, or raises `BackendError`.

    Args:
        name: "cpu" (native kernels and oneDNN), "cuda" (native kernels for compute capability 9.0), "triton",
            "flash_attn", "xformers" or "apex" (those packages, where they are installed), "torch" (PyTorch's operators,
            anywhere) or "reference" (plain eager code).

    Raises:
        ValueError: there is no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"there is no backend {name!r}: choose from {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def strict() -> Iterator[None]:
    """Within the context, of this thread or task alone, an operator that is not served by a backend made for its
    device raises `BackendError` instead of falling back."""
    token = _strict.set(True)
    try:
        yield
    finally:
        _strict.reset(token)


def in_force() -> tuple[str | None, bool]:
    """What `use_backend` and `strict` say here: the name of a backend or None, and whether falling back raises."""
    return _forced.get(), _strict.get()


class Op:
    """An operator with its backends, registered as `torch.ops.mplug2_fast.NAME`.

    Args:
        spec: what it computes.
        schema: arguments and results, as torch writes them: `"(Tensor x, float eps) -> Tensor"`.
        backends: in order of preference; one named "torch", which autograd can follow, has to be among them if the
            operator has gradients. "reference" is added from the specification.
        fake: takes the arguments, returns empty tensors of the results' shapes, types and strides, made from the first.
        check: takes the arguments; raises ValueError or TypeError where they do not go together. Every way to call the
            operator, `torch.ops` included, goes through it.
        formula: as the "torch" backend's `run`, with derivatives of every order and mode; None where that has them.
        autocast: whether floating-point arguments are cast under autocast, as for `F.linear`.
        backward_reads_results: whether backends' own backwards are given the results of `train`.
    """

    def __init__(
        self,
        spec: Spec,
        schema: str,
        backends: Sequence[Backend],
        fake: Callable[..., Any],
        *,
        check: Callable[..., None],
        formula: Callable[..., Any] | None = None,
        autocast: bool = False,
        backward_reads_results: bool = False,
    ) -> None:
        self.spec, self.name, self.autocast = spec, spec.name, autocast
        self.check, self._fake, self._reads_results = check, fake, backward_reads_results
        reference = Backend("reference", spec.reference, differentiable=True)
        self.backends = {backend.name: backend for backend in (*backends, reference)}
        self._automatic = [backend for backend in self.backends.values() if backend.name != "reference"]
        arguments, results = schema.split(" -> ")
        declared = [part.split("=")[0].split() for part in arguments.strip("()").split(", ")]
        self._names = [name for _, name in declared]
        self._tensors_at = [i for i, (kind, _) in enumerate(declared) if kind.startswith("Tensor")]
        self._written_at = [i for i, (kind, _) in enumerate(declared) if kind.endswith("!)")]
        self._formula = formula or self.backends["torch"].run
        _LIBRARY.define(f"{self.name}{schema}")
        _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mplug2_fast::{self.name}", self._checked_fake, lib=_LIBRARY)
        self._torch_op = getattr(torch.ops.mplug2_fast, self.name).default
        self._training_op = self._torch_op
        self._saving = {backend.name for backend in backends if backend.train}
        self._saving_devices = {device for backend in backends if backend.train for device in backend.devices}
        if spec.differentiable:
            self._results = results.count("Tensor")
            self._wanted = [i for i, argument in enumerate(self._names) if argument in spec.differentiable]
            self._register_backward(arguments.strip("()"))
            if self._saving_devices:
                self._register_training(arguments, results.strip("()"))
        flop_formulas.add(self)

    # --- which backend

    def explain(self, *arguments: Any) -> Explanation:
        """Who serves a call with these arguments, all of them, in order."""
        self.check(*arguments)
        chosen, reasons = None, {}
        forced, needs_grad = _forced.get(), self._needs_grad(self._tensors(arguments))
        for backend in self.backends.values():
            why = self._reasons(backend, arguments, needs_grad and forced is None)
            if not why and forced is None and backend.slower_reasons:
                why = backend.slower_reasons(needs_grad, *arguments)
            if not why and chosen is None and (forced == backend.name or (not forced and backend.name != "reference")):
                chosen = backend.name
            else:
                reasons[backend.name] = tuple(why) or (_passed_over(backend.name, chosen, forced),)
        if forced is not None and forced not in self.backends:
            reasons[forced] = ("this operator has no such backend",)
        return Explanation(self.name, chosen, reasons)

    def choose(self, arguments: tuple[Any, ...], *, needs_grad: bool = False) -> Backend:
        """The backend that serves a call. Raises `BackendError` where none may."""
        return self._choose(arguments, self._tensors(arguments), needs_grad)

    def _choose(self, arguments: tuple[Any, ...], tensors: list[Tensor], needs_grad: bool) -> Backend:
        forced = _forced.get()
        if forced is not None:
            backend = self.backends.get(forced)
            if backend is not None and not self._reasons(backend, arguments, False):
                return backend
            raise self._error(f"{self.name} cannot run on the backend {forced!r}", arguments)
        outrun, devices = False, _device_types(tensors)
        for backend in self._automatic:
            if backend.devices and not devices.issubset(backend.devices):  # before reasons are put into words
                continue
            if (needs_grad and not backend.trains) or backend.not_supported_reasons(*arguments):
                continue
            if backend.slower_reasons and backend.slower_reasons(needs_grad, *arguments):
                outrun = True
                continue
            if _strict.get() and not outrun and backend not in self._made_for(arguments):
                raise self._error(f"{self.name} would fall back to {backend.name!r}", arguments)
            if backend.name != "cpu" and "cpu" in devices:
                _native.warn_without_native()
            return backend
        raise self._error(f"{self.name} has no backend for this call", arguments)

    def _made_for(self, arguments: tuple[Any, ...]) -> list[Backend]:
        """Our own backends for the device of the arguments, or where there are none the first that serves it."""
        device = self._tensors(arguments)[0].device.type
        able = [b for b in self._automatic if not b.devices or device in b.devices]
        return [b for b in able if b.devices and b.name not in packages.BACKENDS] or able[:1]

    def _reasons(self, backend: Backend, arguments: tuple[Any, ...], needs_grad: bool) -> Sequence[str]:
        if backend.devices and not _device_types(tensors := self._tensors(arguments)).issubset(backend.devices):
            device = next(t.device for t in tensors if _device_type(t) not in backend.devices)
            return (f"it is for {' and '.join(backend.devices)}, not for {device}",)
        if backend.name not in formula.BACKENDS and (why := formula.reason(self._tensors(arguments))):
            return (why,)
        if needs_grad and not backend.trains:
            return ("gradients are asked for, and it has no backward of its own",)
        return backend.not_supported_reasons(*arguments)

    def _own_backward(self, arguments: tuple[Any, ...]) -> Backend | None:
        """The first backend with a backward of its own that serves these arguments, whatever is forced: the forward
        and the backward of a training step, and both under a compiler, come to the same answer."""
        able = (b for b in self._automatic if b.backward is not None and not self._reasons(b, arguments, False))
        return next(able, None)

    def _error(self, what: str, arguments: tuple[Any, ...]) -> BackendError:
        shown = ", ".join(
            f"{name} {str(a.dtype).removeprefix('torch.')} {tuple(a.shape)} on {a.device}"
            for name, a in zip(self._names, arguments, strict=True)
            if isinstance(a, Tensor)
        )
        explanation = self.explain(*arguments)
        reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in explanation.reasons.items())
        return BackendError(f"{what}. Arguments: {shown}. {reasons}")

    # --- how it is called

    def __call__(self, *arguments: Any) -> Any:
        tensors = self._tensors(arguments)
        if _tracing() is None:  # in a trace sizes are tensors, and comparing them warns
            try:
                self.check(*arguments)
            except RuntimeError:
                self._check_shapes(arguments)
        if self.autocast and (dtype := autocast_dtype(tensors[0])) is not None:
            arguments = _autocast(arguments, dtype)
            tensors = self._tensors(arguments)
        if _is_compiling():
            # What is forced while a graph is made is part of the graph.
            saves = self._saving_devices and self._needs_grad(tensors) and self._saves(tensors, _forced_name())
            return self._trained(arguments) if saves else self._torch_op(*arguments)
        if not formula.is_ordinary(tensors):
            if formula.is_needed(tensors):
                return self._run_formula(arguments, tensors)
            if formula.is_watched(tensors):
                flop_formulas.register()
                return self._torch_op(*arguments)
        if not memory.is_sound(tensors):
            if any(map(memory.is_opaque, tensors)):
                return self._run_formula(arguments, tensors)
            arguments = self._sound(arguments)
            tensors = self._tensors(arguments)
        for i in self._written_at:
            memory.check_written(self._names[i], arguments[i])
        needs_grad = self._needs_grad(tensors)
        backend = self._choose(arguments, tensors, needs_grad)
        if needs_grad and not backend.differentiable:
            return self._trained(arguments) if backend.train else self._torch_op(*arguments)
        return backend.run(*arguments)

    def _check_shapes(self, arguments: tuple[Any, ...]) -> None:
        try:
            self.check(*arguments)
        except RuntimeError:  # torch's, of a tensor that has no shape
            if any(t.is_nested for t in self._tensors(arguments)):
                raise TypeError(
                    f"{self.name} is not for nested tensors of the strided layout: make them with layout=torch.jagged"
                ) from None
            raise

    def _sound(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, every value in memory as it is meant. Raises ValueError where memory is missing."""
        made = list(arguments)
        for i in self._tensors_at:
            if made[i] is not None:
                memory.check(self._names[i], made[i])
                if i not in self._written_at:
                    made[i] = made[i].resolve_neg()
        for i in self._written_at:
            if made[i].is_neg():
                raise ValueError(
                    f"{self._names[i]} is written, and its minus sign is pending: call resolve_neg() first"
                )
            memory.check_written(self._names[i], made[i])
        return tuple(made)

    def _run_formula(self, arguments: tuple[Any, ...], tensors: list[Tensor]) -> Any:
        """By PyTorch's own operators, because others follow or only those know the tensors."""
        if self._choose_formula(arguments, tensors).name == "reference":
            return self.backends["reference"].run(*arguments)
        return self._formula(*arguments) if formula.differentiates() else self.backends["torch"].run(*arguments)

    def _choose_formula(self, arguments: tuple[Any, ...], tensors: list[Tensor]) -> Backend:
        backend = self.backends.get(_forced.get() or "torch")
        if backend is None or backend.name not in formula.BACKENDS:
            raise self._error(f"{self.name} cannot run on the backend {_forced.get()!r}", arguments)
        if _strict.get() and backend not in self._made_for(arguments):
            raise self._error(f"{self.name} would fall back to {backend.name!r}", arguments)
        return backend

    def _saves(self, tensors: list[Tensor], forced: str | None) -> bool:
        """Whether a backend that saves something for its backward may serve on this device."""
        if forced is not None and forced not in self._saving:
            return False
        return any(t.device.type in self._saving_devices for t in tensors)

    def _trained(self, arguments: tuple[Any, ...]) -> Any:
        *results, _ = self._training_op(*arguments)
        return tuple(results) if len(results) > 1 else results[0]

    def public(self, arguments: _F) -> _F:
        """Makes the function that users call from one that checks its arguments and returns all of the operator's."""

        serve = self.__call__

        @functools.wraps(arguments)
        def call(*args: Any, **kwargs: Any) -> Any:
            return serve(*arguments(*args, **kwargs))

        call.op = self  # type: ignore[attr-defined]
        call.arguments = arguments  # type: ignore[attr-defined]
        call.__signature__ = inspect.signature(arguments)  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    def _tensors(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        return [arguments[i] for i in self._tensors_at if arguments[i] is not None]

    def _needs_grad(self, tensors: list[Tensor]) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

    # --- what torch knows of it

    def _run(self, *arguments: Any) -> Any:
        arguments = self._checked(arguments)
        if not self.spec.differentiable and self._needs_grad(self._tensors(arguments)):
            raise BackendError(
                f"torch.ops.mplug2_fast.{self.name} has no gradients: call it under torch.no_grad(), or "
                f"mplug2_fast.ops.{self.name}, which has those of PyTorch's operators"
            )
        return self.choose(arguments).run(*arguments)

    def _checked(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments as kernels may read them. Raises where they do not go together or their memory is missing."""
        self._check_shapes(arguments := tuple(arguments))
        self._refuse_tangents(tensors := self._tensors(arguments))
        return arguments if memory.is_sound(tensors) and not self._written_at else self._sound(arguments)

    def _refuse_tangents(self, tensors: Sequence[Tensor]) -> None:
        if formula.have_tangents(tensors):
            raise NotImplementedError(
                f"torch.ops.mplug2_fast.{self.name} has no forward-mode derivative: call mplug2_fast.ops.{self.name}"
            )

    def _checked_fake(self, *arguments: Any) -> Any:
        self._check_shapes(arguments)
        return self._fake(*arguments)

    def _register_backward(self, arguments: str) -> None:
        """NAME_backward is an operator too, so that compilers need not look into it."""
        name = f"{self.name}_backward"
        schema = f"{name}(Tensor?[] grads, {arguments}, bool[] needs, Tensor[]? saved=None) -> Tensor[]"
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, self._backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mplug2_fast::{name}", self._fake_backward, lib=_LIBRARY)
        self._backward_op = getattr(torch.ops.mplug2_fast, name).default
        self._register_autograd(self.name)

    def _backward(self, grads: list[Tensor | None], *given: Any) -> list[Tensor]:
        count = len(self._names)
        arguments, needs = self._checked(given[:count]), given[count]
        saved = given[count + 1] if len(given) > count + 1 else None  # what equals its default is not handed over
        self._check_backward(grads, arguments, needs, saved)
        backend = self._own_backward(arguments)
        if backend is None or backend.backward is None:
            return self._recomputed(grads, list(arguments), needs)
        expected = self._expected(arguments)
        self._check_like("grads", grads, expected)
        if saved is None:
            saved = self._save(backend, arguments) if backend.train or self._reads_results else []
        else:
            kept = [] if backend.saved is None else backend.saved(_on_meta(arguments[0]), *arguments[1:])
            self._check_like("saved", saved, [*expected, *kept] if self._reads_results else kept)
        return [_fresh(grad, grads) for grad in backend.backward(grads, arguments, saved, needs)]

    def _check_backward(self, grads: list[Tensor | None], arguments: tuple[Any, ...], needs: list[bool], saved: Any):
        if len(grads) != self._results or len(needs) != len(self._wanted):
            raise ValueError(
                f"{self.name}_backward takes {self._results} grads and {len(self._wanted)} needs, got {len(grads)} and "
                f"{len(needs)}"
            )
        for index in self._asked_for(needs):
            if arguments[index] is None:
                raise ValueError(
                    f"{self.name}_backward cannot give the gradient of {self._names[index]}, which is None"
                )
        for name, tensors in (("grads", grads), ("saved", saved or ())):
            for i, tensor in enumerate(tensors):
                if tensor is not None:
                    memory.check(f"{name}[{i}]", tensor)
        self._refuse_tangents([grad for grad in grads if grad is not None])

    def _expected(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        """Tensors of the results' shapes and types, without memory."""
        return list(_as_tuple(self._fake(_on_meta(arguments[0]), *arguments[1:])))

    def _check_like(self, what: str, given: Sequence[Tensor | None], expected: Sequence[Tensor]) -> None:
        found = [None if t is None else (tuple(t.shape), t.dtype) for t in given]
        wanted = [(tuple(t.shape), t.dtype) for t in expected]
        if len(found) != len(wanted) or any(f not in (None, w) for f, w in zip(found, wanted, strict=True)):
            raise ValueError(f"{what} of {self.name}_backward must be {wanted}, got {found}")

    def _save(self, backend: Backend, arguments: Sequence[Any]) -> list[Tensor]:
        """What `backend.backward` reads, by the forward once more."""
        saved = [] if backend.saved is None else backend.saved(*arguments)
        if not saved and not self._reads_results:
            return []
        results = backend.train(*arguments, saved) if backend.train else backend.run(*arguments)
        return [*_as_tuple(results), *saved] if self._reads_results else saved

    def _recomputed(self, grads: list[Tensor | None], values: list[Any], needs: list[bool]) -> list[Tensor]:
        """The gradients of PyTorch's formula."""
        needed = self._asked_for(needs)
        with torch.enable_grad():
            for index in needed:
                values[index] = values[index].detach().requires_grad_()
            outs = _as_tuple(self.backends["torch"].run(*values))
        found = _gradients(outs, [values[index] for index in needed], grads)
        return [grad.clone(memory_format=torch.contiguous_format) for grad in found]

    def _differentiated(self, grads: Sequence[Tensor | None], values: list[Any], needs: list[bool]) -> list[Tensor]:
        """As `_recomputed`, and what can be differentiated again, to any order and in any mode."""
        needed = self._asked_for(needs)
        with torch.enable_grad():
            for index in needed:  # one tensor may be two arguments
                values[index] = values[index].view_as(values[index])
            outs = _as_tuple(self._formula(*values))
        leaves = [values[index] for index in needed]
        return _gradients(outs, leaves, grads, create_graph=torch.is_grad_enabled())

    def _fake_backward(self, grads: list[Tensor | None], *given: Any) -> list[Tensor]:
        taken = [given[index] for index in self._asked_for(given[len(self._names)])]
        return [torch.empty_like(value, memory_format=torch.contiguous_format) for value in taken]

    def _asked_for(self, needs: list[bool]) -> list[int]:
        """Positions of the arguments whose gradients are needed."""
        return [index for index, need in zip(self._wanted, needs, strict=True) if need]

    def _register_training(self, arguments: str, results: str) -> None:
        name = f"{self.name}_train"
        _LIBRARY.define(f"{name}{arguments} -> ({results}, Tensor[])")
        _LIBRARY.impl(name, self._train, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mplug2_fast::{name}", self._fake_train, lib=_LIBRARY)
        self._training_op = getattr(torch.ops.mplug2_fast, name).default
        self._register_autograd(name)

    def _train(self, *arguments: Any) -> tuple[Any, ...]:
        arguments = self._checked(arguments)
        backend = self._own_backward(arguments)
        if backend is None or backend.train is None:
            return *_as_tuple(self.choose(arguments).run(*arguments)), []
        saved = [] if backend.saved is None else backend.saved(*arguments)
        return *_as_tuple(backend.train(*arguments, saved)), saved

    def _fake_train(self, *arguments: Any) -> tuple[Any, ...]:
        self._check_shapes(arguments)
        backend = self._own_backward(arguments)
        saves = backend is not None and backend.train is not None and backend.saved is not None
        return *_as_tuple(self._fake(*arguments)), backend.saved(*arguments) if saves else []

    def _register_autograd(self, name: str) -> None:
        trains = name != self.name

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            *results, saved = output if trains else (*_as_tuple(output), [])
            if saved and self._reads_results:
                saved = [*results, *saved]
            tensors = [value for value in inputs if isinstance(value, Tensor)]
            ctx.save_for_backward(*tensors, *saved)
            ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]
            ctx.set_materialize_grads(False)

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            tensors = iter(ctx.saved_tensors)
            values = [next(tensors) if other is None else other[0] for other in ctx.others]
            needs = [ctx.needs_input_grad[index] for index in self._wanted]
            wanted = list(grads[: self._results])
            # With create_graph, or of many gradients at once, the gradients are to be differentiated or batched.
            if torch.is_grad_enabled() or formula.are_followed(wanted):
                found = iter(self._differentiated(wanted, values, needs))
            else:
                found = iter(self._backward_op(wanted, *values, needs, list(tensors) or None))
            result: list[Tensor | None] = [None] * len(values)
            for index in self._asked_for(needs):
                result[index] = next(found)
            return tuple(result)

        torch.library.register_autograd(f"mplug2_fast::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def _gradients(
    outs: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor | None], *, create_graph: bool = False
) -> list[Tensor]:
    """Those of the leaves; zeros where nothing depends on one."""
    pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None and o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, create_graph=create_graph
    )
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def _on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _fresh(grad: Tensor, grads: list[Tensor | None]) -> Tensor:
    """An operator must not return what it was given."""
    return grad.clone() if any(grad is given for given in grads) else grad


def _forced_name() -> str | None:
    return _forced.get()


# As torch.compiler.assume_constant_result does, which imports the whole compiler first, and Triton: half of the time of
# importing this package.
_forced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve `operator(*args, **kwargs)`, and why each of the others would not.

    Args:
        operator: a function of `mplug2_fast.ops`.
    """
    if not hasattr(operator, "op"):
        raise TypeError(f"{operator!r} is not an operator of mplug2_fast.ops")
    return operator.op.explain(*operator.arguments(*args, **kwargs))


def _passed_over(name: str, chosen: str | None, forced: str | None) -> str:
    if forced is not None:
        return f"use_backend({forced!r}) is in force"
    return "it runs only where use_backend asks for it" if name == "reference" else f"{chosen} comes first"


def _device_type(tensor: Tensor) -> str:
    """`tensor.device.type` without making a string each time."""
    return "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type


def _device_types(tensors: list[Tensor]) -> set[str] | frozenset[str]:
    return _CPU if all(map(_is_cpu, tensors)) else set(map(_device_type, tensors))


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The type that autocast asks for on the tensor's device; None where it is off, or the device has none."""
    device = _device_type(tensor)
    if device not in _WITH_AUTOCAST and not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _autocast(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
