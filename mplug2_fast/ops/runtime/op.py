"""An operator as it is called: directly, or through `torch.ops.mplug2_fast`.

Outside of `torch.compile` a call without gradients goes straight to its backend. All others go through
`torch.ops.mplug2_fast`, where every operator has a fake implementation and a backward (see `derivatives`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mplug2_fast.errors import BackendError
from mplug2_fast.ops.runtime import flop_formulas, formula, memory
from mplug2_fast.ops.runtime.autocast import autocast_dtype, cast
from mplug2_fast.ops.runtime.backend import Backend, forced_while_compiling
from mplug2_fast.ops.runtime.choice import CPU, Choice, Explanation, device_types, needs_gradients, tensors_of
from mplug2_fast.ops.runtime.derivatives import Derivatives
from mplug2_fast.ops.runtime.library import register
from mplug2_fast.ops.runtime.schema import returned, schema
from mplug2_fast.ops.runtime.spec import Spec

Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., Any])

_is_compiling, _tracing = torch.compiler.is_compiling, torch._C._get_tracing_state


class Op(Generic[Result]):
    """An operator with its backends, registered as `torch.ops.mplug2_fast.NAME`.

    Args:
        spec: what it computes.
        backends: in order of preference. An operator with gradients needs one named "torch" that autograd can follow.
            "reference" is added.
        fake: takes Arguments, returns empty tensors of the results' shapes, dtypes and strides, made from the first
            argument.
        check: takes Arguments, raises ValueError or TypeError if they do not fit together. Every way to call the
            operator runs it, `torch.ops` included.
        formula: the "torch" backend's `run` with derivatives of every order and mode; None if `run` has them.
        autocast: whether autocast casts floating-point arguments, as for `F.linear`.
        backward_reads_results: whether the backends' backwards read the results of `train`.
    """

    def __init__(
        self,
        spec: Spec,
        backends: Sequence[Backend],
        fake: Callable[[Any], Any],
        *,
        check: Callable[[Any], None],
        formula: Callable[[Any], Any] | None = None,
        autocast: bool = False,
        backward_reads_results: bool = False,
    ) -> None:
        self.spec, self.name, self.arguments = spec, spec.name, spec.arguments
        self.check, self.fake, self.autocast = check, fake, autocast
        self.choice = Choice(spec, backends)
        self.backends = self.choice.backends
        self.formula = formula or self.backends["torch"].run
        self.names = [argument.name for argument in spec.declared]
        self.tensors_at = [i for i, argument in enumerate(spec.declared) if argument.is_tensor]
        self.written_at = [i for i, argument in enumerate(spec.declared) if argument.is_written]
        declared = f"({schema(spec.declared)}) -> {returned(len(spec.results))}"
        self.torch_op = register(self.name, declared, self._run, self._run_fake)
        self.derivatives = Derivatives(self, backward_reads_results) if spec.differentiable else None
        self.training_op = self.derivatives.training_op if self.derivatives else self.torch_op
        flop_formulas.add(self)

    def public(self, function: Function) -> Function:
        """Marks the function that users call, for `explain`."""
        function.__dict__["op"] = self
        return function

    def __call__(self, *values: Any) -> Result:
        arguments = self.arguments(*values)
        is_traced = _tracing() is not None
        if not is_traced:  # in a trace sizes are tensors, and comparing them warns
            try:
                self.check(arguments)
            except RuntimeError:
                self.check_shapes(arguments)
        if self.autocast and (dtype := autocast_dtype(arguments[0])) is not None:
            arguments = self.arguments(*cast(arguments, dtype))
        if _is_compiling():
            # A backend that is forced during compilation becomes part of the graph.
            tensors = tensors_of(arguments)
            trains = self.derivatives is not None and needs_gradients(tensors)
            if trains and self.derivatives.saves(tensors, forced_while_compiling()):
                return self.derivatives.train(arguments)
            return self.torch_op(*arguments)
        if not is_traced and formula.nothing_follows() and (facts := memory.facts(arguments)):
            needs_grad = facts & memory.REQUIRES_GRAD and torch.is_grad_enabled()
            devices = CPU if facts & memory.ON_CPU else device_types(tensors_of(arguments))
        else:
            tensors = tensors_of(arguments)
            if formula.is_needed(tensors):
                return self._run_formula(arguments)
            if formula.is_watched(tensors):
                flop_formulas.register()
                return self.torch_op(*arguments)
            if any(map(memory.is_opaque, tensors)):
                return self._run_formula(arguments)
            arguments = self._readable(arguments)
            needs_grad, devices = needs_gradients(tensors), device_types(tensors)
        for i in self.written_at:
            memory.check_written(self.names[i], arguments[i])
        backend = self.choice.choose(arguments, bool(needs_grad), devices)
        if needs_grad and not backend.differentiable:
            return self.derivatives.train(arguments) if backend.train else self.torch_op(*arguments)
        return backend.run(arguments)

    def run(self, *values: Any) -> Result:
        """Runs the backend that serves the values, without checks or gradients. Other operators' kernels call this."""
        arguments = self.arguments(*values)
        return self.choose(arguments).run(arguments)

    def direct(self, backend: str) -> Callable[..., Result]:
        """One backend's `run` without dispatch, for measurements."""
        run = self.backends[backend].run
        return lambda *values: run(self.arguments(*values))

    def choose(self, arguments: Any) -> Backend:
        return self.choice.choose(arguments, False, device_types(tensors_of(arguments)))

    def explain(self, *values: Any) -> Explanation:
        """Which backend serves a call with these arguments, and why the others do not."""
        arguments = self.arguments(*values)
        self.check(arguments)
        return self.choice.explain(arguments, needs_gradients(tensors_of(arguments)))

    def check_shapes(self, arguments: Any) -> None:
        try:
            self.check(arguments)
        except RuntimeError:  # PyTorch's error for a tensor that has no shape
            if any(t.is_nested for t in tensors_of(arguments)):
                raise TypeError(
                    f"{self.name} does not support nested tensors with the strided layout: create them with "
                    "layout=torch.jagged"
                ) from None
            raise

    def checked(self, values: Sequence[Any]) -> Any:
        """Arguments that kernels may read as they are. Raises if they do not fit together or memory is missing."""
        arguments = self.arguments(*values)
        self.check_shapes(arguments)
        self.refuse_tangents(tensors_of(arguments))
        return arguments if memory.facts(arguments) and not self.written_at else self._readable(arguments)

    def refuse_tangents(self, tensors: Sequence[Tensor]) -> None:
        if formula.have_tangents(tensors):
            raise NotImplementedError(
                f"torch.ops.mplug2_fast.{self.name} has no forward-mode derivative: call mplug2_fast.ops.{self.name}"
            )

    def _readable(self, arguments: Any) -> Any:
        """The arguments without pending minus signs. Raises ValueError if memory is missing."""
        values = list(arguments)
        for i in self.tensors_at:
            if values[i] is not None:
                memory.check(self.names[i], values[i])
                if i not in self.written_at:
                    values[i] = values[i].resolve_neg()
        for i in self.written_at:
            if values[i].is_neg():
                raise ValueError(f"{self.names[i]} is written and has a pending minus sign: call resolve_neg() first")
            memory.check_written(self.names[i], values[i])
        return arguments._make(values)

    def _run_formula(self, arguments: Any) -> Any:
        """Runs PyTorch's own operators, for callers that follow only those and tensors that only those can read."""
        backend = self.choice.choose_formula(arguments)
        if backend.name == "torch" and formula.differentiates():
            return self.formula(arguments)
        return backend.run(arguments)

    def _run(self, *values: Any) -> Any:
        """`torch.ops.mplug2_fast.NAME`."""
        arguments = self.checked(values)
        if self.derivatives is None and needs_gradients(tensors_of(arguments)):
            raise BackendError(
                f"torch.ops.mplug2_fast.{self.name} has no gradients: call it under torch.no_grad(), or call "
                f"mplug2_fast.ops.{self.name}, which has those of PyTorch's operators"
            )
        return self.choose(arguments).run(arguments)

    def _run_fake(self, *values: Any) -> Any:
        arguments = self.arguments(*values)
        self.check_shapes(arguments)
        return self.fake(arguments)


def explain(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve `operator(*args, **kwargs)`, and why the others would not.

    Args:
        operator: a function of `mplug2_fast.ops`.
    """
    op = getattr(operator, "op", None)
    if not isinstance(op, Op):
        raise TypeError(f"{operator!r} is not an operator of mplug2_fast.ops")
    call = inspect.signature(operator).bind(*args, **kwargs)
    call.apply_defaults()
    values = {}
    for name, value in call.arguments.items():
        if name in op.names:
            values[name] = value
        else:  # a layer's weight, bias and perhaps scale
            values |= {f"{name}_{kind}": part for kind, part in zip(("weight", "bias", "scale"), value, strict=False)}
    return op.explain(*op.arguments(**values))
