"""8-bit weights: when a checkpoint is loaded with them, what its configuration says, and rounding while reading."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mplug2_fast.checkpoint.load import copy_official
from mplug2_fast.devices import INT8, eight_bit, pick_device, pick_dtype
from mplug2_fast.errors import CheckpointError, ConfigError, printable
from mplug2_fast.models.eight_bit import FORMATS, Quantisation, require_matches, units_of
from mplug2_fast.ops.linear_fp8 import REMEDY, device_reasons
from mplug2_fast.ops.runtime import formula, onednn
from mplug2_fast.ops.runtime.backend import forced

QUANTISATION_KEY = "quantisation"
"""Entry of config.json that says that linear layers have 8-bit weights, and which ones do not."""

OTHERS = torch.bfloat16
"""Dtype of the other weights in files."""


def others_dtype(device: torch.device | None = None) -> torch.dtype:
    """The dtype of the other weights in memory: bfloat16 if the device multiplies it, otherwise float32."""
    if device is not None and device.type != "cpu":
        return pick_dtype(None, device)
    return torch.bfloat16 if onednn.multiplies(torch.bfloat16) else torch.float32


def to_json(quantisation: Quantisation) -> dict[str, Any]:
    """What config.json says of 8-bit weights."""
    return {"weights": quantisation.weights, "keep": list(quantisation.keep)}


def from_json(stated: Any) -> Quantisation:
    """The format, and the layers that are not rounded, from what config.json says. Raises `CheckpointError`."""
    keep = stated.get("keep", []) if isinstance(stated, dict) else None
    known = isinstance(keep, list) and all(isinstance(each, str) for each in keep)
    if not known or stated.get("weights") not in tuple(FORMATS):
        raise CheckpointError(
            f"its {QUANTISATION_KEY} is {printable(repr(stated))}: this version reads weights {' or '.join(FORMATS)} "
            "with a list keep"
        )
    return Quantisation(stated["weights"], tuple(keep))


def rounding(name: str, stored: Quantisation | None, dtype: Any, keep: Sequence[str]) -> Quantisation | None:
    """The 8-bit weights that a model gets, or None.

    Args:
        name: of the file. stored: that of its weights, or None if they are wide. dtype, keep: what the caller wants.

    Raises:
        CheckpointError: the file has 8-bit weights, and the caller wants others. ConfigError: `keep` has no effect.
    """
    wanted = eight_bit(dtype)
    if stored is None:
        if keep and wanted is None:
            raise ConfigError("keep names layers that are not rounded to 8 bits: use it with the dtype int8 or fp8")
        return None if wanted is None else Quantisation(wanted, keep if isinstance(keep, str) else tuple(keep))
    if keep and tuple(keep) != stored.keep:
        raise ConfigError(f"{name}: its weights are rounded already, so keep has no effect: convert the original again")
    if dtype not in (None, "auto") and wanted != stored.weights:
        other = wanted or str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name}: its weights are rounded to 8 bits and cannot be loaded as {other}: load it as {stored.weights}, "
            f"or load the checkpoint that it was converted from as {other}"
        )
    return stored


def device_of(weights: str, device: torch.device | str | None) -> torch.device:
    """The device of a model with 8-bit weights. Raises `ConfigError` for one that cannot multiply them.

    If `use_backend` has chosen PyTorch's operators, they multiply fp8 on any device.
    """
    if weights == INT8:
        place = pick_device("cpu" if str(device) == "auto" else device or "cpu")
        if place.type != "cpu":
            raise ConfigError(f"int8 weights are for the CPU, and the device is {place}: use fp8 or bfloat16 there")
        return place
    place = pick_device(device or "cpu")
    if forced() not in formula.BACKENDS and (why := device_reasons(place)):
        raise ConfigError(f"{why[0]}: {REMEDY}")
    return place


def read_rounded(
    model: Any,
    quantisation: Quantisation,
    tensors: Mapping[str, torch.Tensor],
    others: torch.dtype,
    done: Callable[[torch.Tensor], None],
) -> Any:
    """Reads wide tensors into a model on the meta device and rounds it, one block after another.

    Args:
        quantisation: the format, and what is not rounded. tensors: official name -> tensor; they fit.
        others: dtype of the other weights. done: called with each tensor after reading it.

    Returns the model. Only one block, or what is outside of blocks, is in memory with wide weights.
    """
    require_matches(model, quantisation.keep, quantisation.weights)
    names = model.official_names
    for name, module, quantise in _pieces(model, quantisation):
        own = {f"{name}{path}" for path in _materialise(module)}
        copy_official(names.views(model, only=own), tensors, done)
        quantise()
        module.to(others)
    model.quantisation = quantisation
    return model.requires_grad_(False)


def _pieces(model: Any, quantisation: Quantisation) -> Iterator[tuple[str, torch.nn.Module, Callable[[], Any]]]:
    """What is read at once: the beginning of its parameters' names, a module, and what rounds it."""
    for unit in units_of(model, quantisation.weights):
        yield f"{unit.name}.", unit.module, functools.partial(unit.quantise, quantisation.keep)
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
        if dtype == torch.float8_e4m3fn or not views[key].numel():
            continue
        if views[key].min() < (-127 if dtype == torch.int8 else 0):
            what = "the 8-bit number -128" if dtype == torch.int8 else "a negative scale"
            raise CheckpointError(f"{key} has {what}: the file is damaged; convert the original again")
