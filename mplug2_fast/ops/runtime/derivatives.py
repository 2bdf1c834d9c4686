"""The backward of an operator, as PyTorch sees it.

NAME_backward computes gradients from the arguments alone. For backends whose backward wants more, NAME_train returns
the results and what the backend saved, and NAME_backward takes that too. Both are operators, so compilers need not look
into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mplug2_fast.ops.runtime import formula, memory
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.library import LIBRARY, register
from mplug2_fast.ops.runtime.schema import schema

if TYPE_CHECKING:
    from mplug2_fast.ops.runtime.op import Op


class Derivatives:
    def __init__(self, op: Op[Any], reads_results: bool) -> None:
        self._op, self._reads_results = op, reads_results
        self._results = len(op.spec.results)
        self.wanted = [i for i, name in enumerate(op.names) if name in op.spec.differentiable]
        """Positions of the arguments that have gradients."""
        arguments = schema(op.spec.declared)
        self.backward_op = register(
            f"{op.name}_backward",
            f"(Tensor?[] grads, {arguments}, bool[] needs, Tensor[]? saved=None) -> Tensor[]",
            self._backward,
            self._fake_backward,
        )
        self._register_autograd(op.name, trains=False)
        self.training_op = op.torch_op
        self._training = [backend for backend in op.backends.values() if backend.train]
        if self._training:
            results = "Tensor, " * self._results
            declared = f"({arguments}) -> ({results}Tensor[])"
            self.training_op = register(f"{op.name}_train", declared, self._train, self._fake_train)
            self._register_autograd(f"{op.name}_train", trains=True)

    def saves(self, tensors: list[Tensor], forced: str | None) -> bool:
        """Whether a backend that saves tensors for its backward may serve on this device."""
        able = [backend for backend in self._training if forced in (None, backend.name)]
        return any(t.device.type in backend.devices for backend in able for t in tensors)

    def train(self, arguments: Any) -> Any:
        """The results, with gradients, by NAME_train."""
        *results, _ = self.training_op(*arguments)
        return tuple(results) if len(results) > 1 else results[0]

    def _own_backward(self, arguments: Any) -> Backend | None:
        return self._op.choice.own_backward(arguments)

    # --- NAME_train

    def _train(self, *values: Any) -> tuple[Any, ...]:
        arguments = self._op.checked(values)
        backend = self._own_backward(arguments)
        if backend is None or backend.train is None:
            return *_as_tuple(self._op.choose(arguments).run(arguments)), []
        buffers = backend.buffers(arguments)
        return *_as_tuple(backend.train(arguments, buffers)), buffers

    def _fake_train(self, *values: Any) -> tuple[Any, ...]:
        arguments = self._op.arguments(*values)
        self._op.check_shapes(arguments)
        backend = self._own_backward(arguments)
        saves = backend is not None and backend.train is not None
        return *_as_tuple(self._op.fake(arguments)), backend.buffers(arguments) if saves else []

    # --- NAME_backward

    def _backward(self, grads: list[Tensor | None], *given: Any) -> list[Tensor]:
        count = len(self._op.names)
        arguments, needs = self._op.checked(given[:count]), given[count]
        saved = given[count + 1] if len(given) > count + 1 else None  # PyTorch drops what equals its default
        self._check(grads, arguments, needs, saved)
        backend = self._own_backward(arguments)
        if backend is None or backend.backward is None:
            return self._recomputed(grads, list(arguments), needs)
        on_meta = arguments._make((_on_meta(arguments[0]), *arguments[1:]))
        expected = list(_as_tuple(self._op.fake(on_meta)))
        self._check_like("grads", grads, expected)
        if saved is None:
            saved = self.save(backend, arguments)
        else:
            buffers = backend.buffers(on_meta)
            self._check_like("saved", saved, [*expected, *buffers] if self._reads_results else buffers)
        found = backend.backward(grads, arguments, saved, needs)
        # An operator must not return a tensor that it was given.
        return [grad.clone() if any(grad is given for given in grads) else grad for grad in found]

    def _fake_backward(self, grads: list[Tensor | None], *given: Any) -> list[Tensor]:
        taken = [given[index] for index in self._needed(given[len(self._op.names)])]
        return [torch.empty_like(value, memory_format=torch.contiguous_format) for value in taken]

    def save(self, backend: Backend, arguments: Any) -> list[Tensor]:
        """What `backend.backward` reads, by running the forward again."""
        buffers = backend.buffers(arguments)
        if not buffers and not self._reads_results:
            return []
        results = backend.train(arguments, buffers) if backend.train else backend.run(arguments)
        return [*_as_tuple(results), *buffers] if self._reads_results else buffers

    def _recomputed(self, grads: list[Tensor | None], values: list[Any], needs: list[bool]) -> list[Tensor]:
        """The gradients of the "torch" backend's formula."""
        needed = self._needed(needs)
        with torch.enable_grad():
            for index in needed:
                values[index] = values[index].detach().requires_grad_()
            outs = _as_tuple(self._op.backends["torch"].run(self._op.arguments(*values)))
        found = _gradients(outs, [values[index] for index in needed], grads)
        return [grad.clone(memory_format=torch.contiguous_format) for grad in found]

    def _differentiable(self, grads: Sequence[Tensor | None], values: list[Any], needs: list[bool]) -> list[Tensor]:
        """As `_recomputed`; the gradients can be differentiated again, to any order and in any mode."""
        needed = self._needed(needs)
        with torch.enable_grad():
            for index in needed:  # one tensor may be two arguments
                values[index] = values[index].view_as(values[index])
            outs = _as_tuple(self._op.formula(self._op.arguments(*values)))
        leaves = [values[index] for index in needed]
        return _gradients(outs, leaves, grads, create_graph=torch.is_grad_enabled())

    def _needed(self, needs: list[bool]) -> list[int]:
        """Positions of the arguments whose gradients are needed."""
        return [index for index, need in zip(self.wanted, needs, strict=True) if need]

    def _check(self, grads: list[Tensor | None], arguments: Any, needs: list[bool], saved: Any) -> None:
        name = f"{self._op.name}_backward"
        if len(grads) != self._results or len(needs) != len(self.wanted):
            raise ValueError(
                f"{name} takes {self._results} grads and {len(self.wanted)} needs, got {len(grads)} and {len(needs)}"
            )
        for index in self._needed(needs):
            if arguments[index] is None:
                raise ValueError(f"{name} cannot give the gradient of {self._op.names[index]}, which is None")
        for kind, tensors in (("grads", grads), ("saved", saved or ())):
            for i, tensor in enumerate(tensors):
                if tensor is not None:
                    memory.check(f"{kind}[{i}]", tensor)
        self._op.refuse_tangents([grad for grad in grads if grad is not None])

    def _check_like(self, kind: str, given: Sequence[Tensor | None], expected: Sequence[Tensor]) -> None:
        found = [None if t is None else (tuple(t.shape), t.dtype) for t in given]
        wanted = [(tuple(t.shape), t.dtype) for t in expected]
        if len(found) != len(wanted) or any(f not in (None, w) for f, w in zip(found, wanted, strict=True)):
            raise ValueError(f"{kind} of {self._op.name}_backward must be {wanted}, got {found}")

    # --- autograd

    def _register_autograd(self, name: str, *, trains: bool) -> None:
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
            needs = [ctx.needs_input_grad[index] for index in self.wanted]
            of_results = list(grads[: self._results])
            # True with create_graph, and for many gradients at once: these are differentiated again, or batched.
            if torch.is_grad_enabled() or formula.are_followed(of_results):
                found = iter(self._differentiable(of_results, values, needs))
            else:
                found = iter(self.backward_op(of_results, *values, needs, list(tensors) or None))
            result: list[Tensor | None] = [None] * len(values)
            for index in self._needed(needs):
                result[index] = next(found)
            return tuple(result)

        torch.library.register_autograd(f"mplug2_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def _on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _gradients(
    outs: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor | None], *, create_graph: bool = False
) -> list[Tensor]:
    """The gradients of the leaves; zeros for a leaf that no result depends on."""
    pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None and o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, create_graph=create_graph
    )
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]
