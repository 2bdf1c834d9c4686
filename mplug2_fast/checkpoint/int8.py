"""8-bit weights: when a checkpoint is loaded with them, what its configuration says, and rounding while reading."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mplug2_fast.checkpoint.load import copy_official
from mplug2_fast.devices import is_int8
from mplug2_fast.errors import CheckpointError, ConfigError, printable
from mplug2_fast.models.int8 import require_matches, units_of
from mplug2_fast.ops.runtime import onednn

QUANTISATION_KEY = "quantisation"
"""Entry of config.json that says that linear layers have 8-bit weights, and which ones do not."""

OTHERS = torch.bfloat16
"""Dtype of the other weights in files."""


def others_dtype() -> torch.dtype:
    """The dtype of the other weights in memory: bfloat16 if the processor multiplies it, otherwise float32."""
    return torch.bfloat16 if onednn.multiplies(torch.bfloat16) else torch.float32


def to_json(keep: Sequence[str]) -> dict[str, Any]:
    """What config.json says of 8-bit weights."""
    return {"weights": "int8", "keep": list(keep)}


def from_json(stated: Any) -> tuple[str, ...]:
    """The layers that are not rounded, from what config.json says. Raises `CheckpointError`."""
    keep = stated.get("keep", []) if isinstance(stated, dict) else None
    if not isinstance(keep, list) or not all(isinstance(each, str) for each in keep) or stated.get("weights") != "int8":
        raise CheckpointError(
            f"its {QUANTISATION_KEY} is {printable(repr(stated))}: this version reads weights int8 with a list keep"
        )
    return tuple(keep)


def loads_int8(name: str, stored: Sequence[str] | None, dtype: Any, keep: Sequence[str]) -> bool:
    """Whether a model gets 8-bit weights.

    Args:
        name: of the file. stored: its `keep`, or None if its weights are wide. dtype, keep: what the caller wants.

    Raises:
        CheckpointError: the file has 8-bit weights, and the caller wants others. ConfigError: `keep` has no effect.
    """
    if stored is None:
        if keep and not is_int8(dtype):
            raise ConfigError("keep names layers that are not rounded to 8 bits: use it with the dtype int8")
        return is_int8(dtype)
    if keep and tuple(keep) != tuple(stored):
        raise ConfigError(f"{name}: its weights are rounded already, so keep has no effect: convert the original again")
    if dtype not in (None, "auto") and not is_int8(dtype):
        wanted = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name}: its weights are rounded to 8 bits and cannot be loaded as {wanted}: load it as int8, or load the "
            f"checkpoint that it was converted from as {wanted}"
        )
    return True


def read_rounded(
    model: Any,
    keep: Sequence[str],
    tensors: Mapping[str, torch.Tensor],
    others: torch.dtype,
    done: Callable[[torch.Tensor], None],
) -> Any:
    """Reads wide tensors into a model on the meta device and rounds it, one block after another.

    Args:
        keep: see `Model.quantise`. tensors: official name -> tensor; they fit.
        others: dtype of the other weights. done: called with each tensor after reading it.

    Returns the model. Only one block, or what is outside of blocks, is in memory with wide weights.
    """
    require_matches(model, keep)
    names = model.official_names
    for name, module, quantise in _pieces(model, keep):
        own = {f"{name}{path}" for path in _materialise(module)}
        copy_official(names.views(model, only=own), tensors, done)
        quantise()
        module.to(others)
    model.kept = tuple(keep)
    return model.requires_grad_(False)


def _pieces(model: Any, keep: Sequence[str]) -> Iterator[tuple[str, torch.nn.Module, Callable[[], Any]]]:
    """What is read at once: the beginning of its parameters' names, a module, and what rounds it."""
    for unit in units_of(model):
        yield f"{unit.name}.", unit.module, functools.partial(unit.quantise, keep)
    yield "", model, lambda: None


def _materialise(module: torch.nn.Module) -> list[str]:
    """Gives the tensors that are still on the meta device memory, as float32. Returns the names of parameters."""
    found = []
    for prefix, each in module.named_modules():
        for name, parameter in each.named_parameters(recurse=False):
            if parameter.is_meta:
                wide = torch.empty(parameter.shape, dtype=torch.float32)
                each._parameters[name] = torch.nn.Parameter(wide, requires_grad=False)
                found.append(f"{prefix}.{name}" if prefix else name)
    return found


def check_numbers(dtypes: Mapping[str, torch.dtype], views: Mapping[str, torch.Tensor]) -> None:
    """Raises `CheckpointError` for 8-bit weights or scales that rounding cannot give."""
    for key, dtype in dtypes.items():
        if views[key].numel() and views[key].min() < (-127 if dtype == torch.int8 else 0):
            what = "the 8-bit number -128" if dtype == torch.int8 else "a negative scale"
            raise CheckpointError(f"{key} has {what}: the file is damaged; convert the original again")
