"""Copy a released state dict into a model, and back out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from mplug2_fast.checkpoint.fit import Fit, check_fit
from mplug2_fast.checkpoint.keys import TIED_KEYS
from mplug2_fast.config import MPlug2Config, Task
from mplug2_fast.errors import CheckpointError


class ReleasedModel(Protocol):
    """What the fast and the reference models share, as far as checkpoints go."""

    config: MPlug2Config
    task: Task

    def released_parameters(self) -> dict[str, torch.Tensor]:
        """Released key -> a detached view into the model's own parameters."""


def load_released(model: ReleasedModel, state_dict: Mapping[str, Any]) -> Fit:
    """Fill every parameter of `model` from a released state dict; all of it, or nothing.

    Known entries that the task does not use are left alone. Position embeddings of another resolution are resized
    bilinearly over the grid (pixel centres aligned, not corners), the class token kept.

    Args:
        model: a fast or a reference model, with real storage (not on the meta device).
        state_dict: released key, with or without `module.` prefixes -> tensor or NumPy array, of any float dtype.

    Returns what each entry was; `resized` names the position embeddings that were resized.

    Raises `CheckpointError` with a grouped report when anything is missing, unexpected or of another shape.
    """
    tensors = {key: _as_tensor(key, value) for key, value in strip_prefixes(state_dict).items()}
    views = model.released_parameters()
    if any(view.is_meta for view in views.values()):
        raise CheckpointError(
            "the model is on the meta device and has no storage: call model.to_empty(device=...) first"
        )
    fit = check_fit(shapes_of(tensors), model.config, model.task, shapes_of(views))
    fit.require("the state dict")
    check_dtypes(fit, tensors)
    check_twins(fit, tensors)
    copy_released(views, tensors)
    return fit


def released_state_dict(model: ReleasedModel) -> dict[str, torch.Tensor]:
    """Copies of exactly the parameters that the model's task uses, under their released names."""
    return {key: view.clone() for key, view in model.released_parameters().items()}


def copy_released(
    views: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    done: Callable[[torch.Tensor], None] = lambda tensor: None,
) -> None:
    """Copy `tensors`, already known to fit, into `views` one by one; `done` is told each source that was read."""
    with torch.no_grad():
        for key, view in views.items():
            view.copy_(fitted(tensors[key], tuple(view.shape)))
            done(tensors[key])


def fitted(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`tensor` itself, or for position embeddings of another resolution a resized copy of `shape` in float32."""
    if tuple(tensor.shape) == shape:
        return tensor
    width = shape[1]
    old, new = math.isqrt(tensor.shape[0] - 1), math.isqrt(shape[0] - 1)
    class_token, grid = tensor[:1].float(), tensor[1:].float().reshape(1, old, old, width).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(new, new), mode="bilinear", align_corners=False)
    return torch.cat([class_token, grid.permute(0, 2, 3, 1).reshape(new * new, width)])


def check_dtypes(fit: Fit, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `CheckpointError` for needed entries whose dtype is none of weights."""
    wrong = [f"{key} ({tensors[key].dtype})" for key in fit.needed if not tensors[key].dtype.is_floating_point]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} entries are not floating point and cannot be weights, first {wrong[0]}; nothing was loaded\n"
            "  remedy: use a checkpoint that is not quantised"
        )


def check_twins(
    fit: Fit, tensors: Mapping[str, torch.Tensor], done: Callable[[torch.Tensor], None] = lambda tensor: None
) -> None:
    """Raise `CheckpointError` for tied twins that differ; `done` is told each tensor that was read."""
    for key in fit.tied:
        twin = TIED_KEYS[key]
        same = torch.equal(tensors[key], tensors[twin].to(tensors[key].dtype))
        done(tensors[key])
        done(tensors[twin])
        if not same:
            raise CheckpointError(
                f"{key} differs from {twin}, and an mPLUG-2 model has one tensor for both; nothing was loaded\n"
                f"  remedy: find out which one training used, and remove {key} if it is {twin}"
            )


def strip_prefixes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries with every leading `module.` gone. Raises `CheckpointError` for what is no flat state dict."""
    stripped: dict[str, Any] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(f"a state dict has names as keys, this one has {key!r}")
        if isinstance(value, Mapping) and key in ("model", "module", "state_dict"):
            raise CheckpointError(f"this is a whole checkpoint, not a state dict: pass its {key!r} entry")
        name = key
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name in stripped:
            raise CheckpointError(f"{name} is there twice, with and without a 'module.' prefix: remove one of them")
        stripped[name] = value
    return stripped


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Key -> shape."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def dtypes_of(tensors: Iterable[torch.Tensor]) -> dict[str, int]:
    """Dtype name -> number of tensors, most frequent first."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _as_tensor(key: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            raise CheckpointError(f"{key} is on the meta device and has no values")
        return value.detach()
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub":
        array = np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    raise CheckpointError(f"{key} is neither a tensor nor a NumPy array of numbers, but {type(value).__name__}")
