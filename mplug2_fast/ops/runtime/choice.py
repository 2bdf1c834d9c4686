"""Which backend serves a call, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from mplug2_fast import _native
from mplug2_fast.errors import BackendError
from mplug2_fast.ops.runtime import formula, packages
from mplug2_fast.ops.runtime.backend import Backend, forced, is_strict
from mplug2_fast.ops.runtime.spec import Spec

CPU = frozenset(("cpu",))
_is_cpu = attrgetter("is_cpu")


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


class Choice:
    """The backends of an operator, in order of preference; the last one, "reference", runs only if forced."""

    def __init__(self, spec: Spec, backends: Sequence[Backend]) -> None:
        self.name, self.spec = spec.name, spec
        reference = Backend("reference", spec.eager, differentiable=True)
        self.backends = {backend.name: backend for backend in (*backends, reference)}

    @property
    def automatic(self) -> list[Backend]:
        return [backend for backend in self.backends.values() if backend.name != "reference"]

    def choose(self, arguments: Any, needs_grad: bool, devices: frozenset[str]) -> Backend:
        """The backend that serves a call, given the device types of its tensors. Raises `BackendError` if none may."""
        name = forced()
        if name is not None:
            backend = self.backends.get(name)
            if backend is not None and not self.reasons(backend, arguments):
                return backend
            raise self._error(f"{self.name} cannot run on the backend {name!r}", arguments)
        is_slower, on_cpu = False, devices is CPU
        for backend in self.backends.values():  # the cheapest question first
            if (able := backend.devices) and not ("cpu" in able if on_cpu else devices.issubset(able)):
                continue
            if (needs_grad and not backend.trains) or backend.not_supported_reasons(arguments):
                continue
            if backend.name == "reference":
                break
            if backend.slower_reasons and backend.slower_reasons(needs_grad, arguments):
                is_slower = True
                continue
            if is_strict() and not is_slower:
                self._refuse_fallback(backend, arguments)
            if backend.name != "cpu" and "cpu" in devices:
                _native.warn_without_native()
            return backend
        raise self._error(f"{self.name} has no backend for this call", arguments)

    def choose_formula(self, arguments: Any) -> Backend:
        """The backend of PyTorch's own operators: "torch", or "reference" if forced."""
        backend = self.backends.get(forced() or "torch")
        if backend is None or backend.name not in formula.BACKENDS:
            raise self._error(f"{self.name} cannot run on the backend {forced()!r}", arguments)
        if is_strict():
            self._refuse_fallback(backend, arguments)
        return backend

    def own_backward(self, arguments: Any) -> Backend | None:
        """The first backend with its own backward that serves these arguments. What is forced does not matter, so the
        forward and the backward of a training step, compiled or not, choose the same one."""
        able = (b for b in self.automatic if b.backward is not None and not self.reasons(b, arguments))
        return next(able, None)

    def explain(self, arguments: Any, needs_grad: bool) -> Explanation:
        chosen, found, name = None, {}, forced()
        for backend in self.backends.values():
            why = self.reasons(backend, arguments, needs_grad and name is None)
            if not why and name is None and backend.slower_reasons:
                why = backend.slower_reasons(needs_grad, arguments)
            may_serve = name == backend.name if name is not None else backend.name != "reference"
            if not why and chosen is None and may_serve:
                chosen = backend.name
            else:
                found[backend.name] = tuple(why) or (_not_first(backend.name, chosen, name),)
        if name is not None and name not in self.backends:
            found[name] = ("this operator has no such backend",)
        return Explanation(self.name, chosen, found)

    def reasons(self, backend: Backend, arguments: Any, needs_grad: bool = False) -> Sequence[str]:
        """Why a backend cannot serve the arguments."""
        tensors = tensors_of(arguments)
        if backend.devices and not device_types(tensors).issubset(backend.devices):
            device = next(t.device for t in tensors if device_type(t) not in backend.devices)
            return (f"supports {' and '.join(backend.devices)}, got {device}",)
        if backend.name not in formula.BACKENDS and (why := formula.reason(tensors)):
            return (why,)
        if needs_grad and not backend.trains:
            return ("has no backward, and gradients are needed",)
        return backend.not_supported_reasons(arguments)

    def _refuse_fallback(self, backend: Backend, arguments: Any) -> None:
        """Raises if the backend is not one of ours for the device, or the first for the device if we have none."""
        device = tensors_of(arguments)[0].device.type
        able = [b for b in self.automatic if not b.devices or device in b.devices]
        if backend not in ([b for b in able if b.devices and b.name not in packages.BACKENDS] or able[:1]):
            raise self._error(f"{self.name} would fall back to {backend.name!r}", arguments)

    def _error(self, what: str, arguments: Any) -> BackendError:
        shown = ", ".join(
            f"{name} {str(a.dtype).removeprefix('torch.')} {tuple(a.shape)} on {a.device}"
            for name, a in arguments._asdict().items()
            if isinstance(a, Tensor)
        )
        explanation = self.explain(arguments, needs_gradients(tensors_of(arguments)))
        reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in explanation.reasons.items())
        return BackendError(f"{what}. Arguments: {shown}. {reasons}")


def _not_first(name: str, chosen: str | None, forced_name: str | None) -> str:
    if forced_name is not None:
        return f"use_backend({forced_name!r}) is active"
    return "runs only if use_backend selects it" if name == "reference" else f"{chosen} comes first"


def needs_gradients(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def device_type(tensor: Tensor) -> str:
    """`tensor.device.type`, faster."""
    return "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type


def device_types(tensors: list[Tensor]) -> frozenset[str]:
    return CPU if all(map(_is_cpu, tensors)) else frozenset(map(device_type, tensors))


def tensors_of(arguments: Any) -> list[Tensor]:
    return [value for value in arguments if isinstance(value, Tensor)]
