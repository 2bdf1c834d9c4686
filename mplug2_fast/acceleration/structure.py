"""The structure that recognition requires of a module: its parts and the arguments of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mplug2_fast.acceleration.swap import Unserved, Unsuitable

ROLES = {
    "hidden_states": "x",
    "x": "x",
    "attention_mask": "mask",
    "mask": "mask",
    "encoder_hidden_states": "memory",
    "memory": "memory",
    "encoder_attention_mask": "memory_mask",
    "memory_mask": "memory_mask",
    "mode": "mode",
    "layer_nums": "place",
}
"""The role of each argument of BERT modules, by the names that implementations use."""

_UNKNOWN = "it was called with the unknown argument {}"


def has(module: nn.Module, *names: str) -> bool:
    """Whether a module has children with these names."""
    return all(isinstance(module._modules.get(name), nn.Module) for name in names)


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsuitable(reason)


def require_children(module: nn.Module, known: set[str]) -> None:
    unknown = sorted(name for name, child in module._modules.items() if child is not None and name not in known)
    require(not unknown, f"it has an unknown part: {', '.join(unknown)}")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is an instance of `kind` whose class does not replace `forward`."""
    return isinstance(module, kind) and type(module).forward is kind.forward  # type: ignore[attr-defined]


def require_linear(module: nn.Module, name: str) -> nn.Linear:
    part = module.get_submodule(name)
    plain = is_plain(part, nn.Linear) and part._parameters.get("weight") is not None
    require(plain, f"{name or 'it'} is not a plain Linear")
    return part  # type: ignore[return-value]


def require_norm(module: nn.Module, name: str) -> nn.LayerNorm:
    """A layer norm over the last axis with weight and bias. Its class may replace `forward`; a trial checks that."""
    part = module.get_submodule(name)
    require(isinstance(part, nn.LayerNorm), f"{name} is a {type(part).__name__}, not a LayerNorm")
    assert isinstance(part, nn.LayerNorm)
    require_one_axis(part)
    require(part.weight is not None and part.bias is not None, f"{name} has no weight or no bias")
    return part


def require_one_axis(norm: nn.LayerNorm) -> None:
    require(len(norm.normalized_shape) == 1, f"it normalises over several axes: {tuple(norm.normalized_shape)}")


def require_dropout(module: nn.Module, name: str = "dropout") -> None:
    """Accepts a dropout, or nothing, under that name."""
    part = module._modules.get(name)
    require(part is None or isinstance(part, (nn.Dropout, nn.Identity)), f"{name} is a {type(part).__name__}")


def dropout_of(module: nn.Module, name: str = "dropout") -> float:
    """The current probability of a module's dropout."""
    part = module._modules.get(name)
    return part.p if isinstance(part, nn.Dropout) and part.training else 0.0


@dataclass(frozen=True)
class Signature:
    """The arguments of a BERT module's forward in order, and their defaults."""

    names: tuple[str, ...]
    defaults: dict[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, forward: Callable[..., Any]) -> Signature:
        """Raises `Unsuitable` for a forward without a known name for its input."""
        parameters = inspect.signature(forward).parameters.values()
        require(not any(p.kind is p.VAR_POSITIONAL for p in parameters), "its forward takes arguments without names")
        named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        names = tuple(p.name for p in named)
        signature = cls(names, {p.name: p.default for p in named if p.default is not p.empty})
        require("x" in signature.roles, f"its forward takes unknown arguments: {', '.join(names) or 'none'}")
        return signature

    @property
    def default_mode(self) -> Any:
        return self.defaults.get(self.roles.get("mode", ""))

    @property
    def roles(self) -> dict[str, str]:
        """Role -> name of the argument."""
        return {ROLES[name]: name for name in self.names if name in ROLES}

    def arguments(self, **roles: Any) -> dict[str, Any]:
        """Keyword arguments for a call, given by role. Roles that the forward lacks are left out."""
        return {self.roles[role]: value for role, value in roles.items() if role in self.roles}

    def refusal(self, kwargs: Mapping[str, Any]) -> str:
        """Why `bind` refuses the names of a call's keywords; empty if it may accept them. It takes less time."""
        for name, value in kwargs.items():
            if value is not None and value is not False and name not in ROLES:
                return _UNKNOWN.format(name)
        return ""

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by role. Raises `Unserved` for one without a role, unless it is None or False."""
        if len(args) > len(self.names):
            raise Unserved(f"it was called with {len(args)} arguments")
        bound = {}
        for name, value in {**dict(zip(self.names, args, strict=False)), **kwargs}.items():
            role = ROLES.get(name)
            if role in ("mode", "place") and name in self.defaults and value == self.defaults[name]:
                continue
            if role is not None and (role in ("mode", "place") or isinstance(value, (Tensor, type(None)))):
                bound[role] = value
            elif value is not None and value is not False:
                raise Unserved(_UNKNOWN.format(name))
        return bound
