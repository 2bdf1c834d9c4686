"""8-bit weights: when a checkpoint is loaded with them, what its configuration says, and rounding while reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mplug2_fast.checkpoint.load import check_finite, copy_official
from mplug2_fast.devices import is_int8
from mplug2_fast.errors import CheckpointError, ConfigError, printable
from mplug2_fast.models.names import SCALE
from mplug2_fast.ops.linear_int8 import quantise_weight
from mplug2_fast.ops.runtime import onednn

QUANTISATION_KEY = "quantisation"
"""Entry of config.json that says that linear layers have 8-bit weights, and which ones do not."""

OTHERS = torch.bfloat16
"""Dtype of the other weights in files."""

_ROWS = 4096
"""Rows that are rounded at once."""


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


def copy_rounded(
    dtypes: Mapping[str, torch.dtype],
    views: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    done: Callable[[torch.Tensor], None],
) -> None:
    """`copy_official` into a model with 8-bit weights, from wide tensors. `dtypes` are those of its names."""
    for key, view in views.items():
        if key not in dtypes:
            copy_official({key: view}, tensors, done)
        elif dtypes[key] == torch.int8:
            check_finite(key, tensors[key], torch.float32)
            weight, scale = tensors[key].flatten(1), views[f"{key}{SCALE}"]
            parts = (each.split(_ROWS) for each in (weight, view.flatten(1), scale))
            for wide, numbers, factors in zip(*parts, strict=True):
                for target, rounded in zip((numbers, factors), quantise_weight(wide), strict=True):
                    target.copy_(rounded)
            done(tensors[key])


def check_numbers(dtypes: Mapping[str, torch.dtype], views: Mapping[str, torch.Tensor]) -> None:
    """Raises `CheckpointError` for 8-bit weights or scales that rounding cannot give."""
    for key, dtype in dtypes.items():
        if views[key].numel() and views[key].min() < (-127 if dtype == torch.int8 else 0):
            what = "the 8-bit number -128" if dtype == torch.int8 else "a negative scale"
            raise CheckpointError(f"{key} has {what}: the file is damaged; convert the original again")
