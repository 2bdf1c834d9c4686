"""An operator's arguments, declared once: names, types, axes, and which of them the operator writes.

class Arguments(NamedTuple):
    query: Annotated[Tensor, "(rows, heads, head_dim)"]
    keys: Annotated[Tensor, "(rows, heads, length, head_dim)", WRITTEN]
    step: int
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

WRITTEN = "written at `step`"
"""Marks a tensor that the operator writes."""

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    int | None: "int?",
    float: "float",
    bool: "bool",
    torch.dtype: "ScalarType",
}


@dataclass(frozen=True)
class Argument:
    name: str
    type: str
    """As PyTorch's schemas write it."""
    axes: str
    """Empty unless it is a tensor."""
    is_written: bool

    @property
    def is_tensor(self) -> bool:
        return self.type.startswith("Tensor")


def declared(arguments: type[tuple[Any, ...]]) -> list[Argument]:
    """The fields of a NamedTuple."""
    return [_argument(name, hint) for name, hint in get_type_hints(arguments, include_extras=True).items()]


def _argument(name: str, hint: Any) -> Argument:
    notes: tuple[str, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
    kind = "str" if get_origin(hint) is Literal else _TYPES[hint]
    return Argument(name, kind, ", ".join(notes), WRITTEN in notes)


def schema(arguments: list[Argument]) -> str:
    """The arguments as PyTorch's schemas write them: `Tensor query, Tensor(a!) keys, int step`."""
    aliases = iter("abcdefgh")
    types = [f"{a.type}({next(aliases)}!)" if a.is_written else a.type for a in arguments]
    return ", ".join(f"{kind} {a.name}" for kind, a in zip(types, arguments, strict=True))


def returned(count: int) -> str:
    """That many tensors."""
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
