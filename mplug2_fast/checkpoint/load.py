"""Copies official state dicts into models and back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from mplug2_fast.checkpoint.fit import Fit, check_fit
from mplug2_fast.errors import CheckpointError, printable
from mplug2_fast.models import FAMILIES, official_names
from mplug2_fast.models.names import OfficialNames
from mplug2_fast.tasks import TASKS, Task, title_of

_WRAPPERS = frozenset(
    {
        "module",  # DataParallel, DistributedDataParallel, AveragedModel, DeepSpeed
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",
        "_fpw_module",  # FairScale's and early FSDP
        "_checkpoint_wrapped_module",
        "_forward_module",  # Lightning Fabric
        "base_layer",  # peft
    }
)
_OUTER = ("model", "base_model")
"""Attributes that hold the model in modules of Lightning and peft."""
_UNMERGED = re.compile(r"lora_|_flat_param|flat_param|_fpw_flat")
_UNMERGED_REMEDIES = {
    "lora_": "adapters that are not merged into the weights; call merge_and_unload() and save again",
    **dict.fromkeys(
        ("_flat_param", "flat_param", "_fpw_flat"),
        "FSDP's flattened parameters; save again with StateDictType.FULL_STATE_DICT",
    ),
}
_SPELLINGS = {other: ours for family in FAMILIES.values() for other, ours in family.spellings.items()}
_MAX_NAME = 500
_PIECE = 2**17
"""Elements that are copied and checked at once."""

WEIGHT_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


class OfficialModel(Protocol):
    """The interface of fast and reference models that checkpoints use."""

    config: Any
    tasks: dict[str, Task]

    @property
    def official_names(self) -> OfficialNames:
        """The official name of every parameter."""

    def official_parameters(self) -> dict[str, torch.Tensor]:
        """Official name -> a detached view of the model's parameter."""


def load_official(model: OfficialModel, state_dict: Mapping[str, Any]) -> Fit:
    """Loads an official state dict into `model`, completely or not at all.

    Known entries that the model does not use are ignored. Position embeddings of another resolution are resized
    bilinearly over the grid (`align_corners=False`); the class token is kept.

    Args:
        model: a fast or a reference model, with real storage (not on the meta device).
        state_dict: official key, with or without the prefixes of wrappers (`module.`, `_orig_mod.`, FSDP's and
            others) -> tensor or NumPy array, of any float dtype.

    Returns the role of each entry; `resized` has the position embeddings that were resized.

    Raises `CheckpointError` with a grouped report if an entry is missing, unexpected or of another shape, and if a
    weight is not finite or would not be in the model's dtype.
    """
    tensors = {key: _as_tensor(key, value) for key, value in plain_state_dict(state_dict).items()}
    views = model.official_parameters()
    if any(view.is_meta for view in views.values()):
        raise CheckpointError(
            "the model is on the meta device and has no storage: call model.to_empty(device=...) first"
        )
    names = model.official_names
    shapes = shapes_of(tensors)
    fit = check_fit(shapes, names, title_of(model.tasks.values()))
    if not fit.ok:
        fit = replace(fit, servable=servable_tasks(shapes, model.config))
    fit.require("the state dict")
    check_dtypes(fit, tensors, names.dtypes)
    check_twins(fit, names, tensors)
    for key, view in views.items():
        check_finite(key, tensors[key], view.dtype)
    _copy(views, tensors)
    return fit


def servable_tasks(shapes: Mapping[str, Any], config: Any) -> tuple[str, ...]:
    """The tasks of this package whose entries are complete."""
    return tuple(
        name
        for name, task in TASKS.items()
        if config.has_modules_for(task) and official_names(config, name).needed.keys() <= shapes.keys()
    )


def official_state_dict(model: OfficialModel) -> dict[str, torch.Tensor]:
    """Copies of all parameters of a model, under their official names."""
    return {key: view.clone() for key, view in model.official_parameters().items()}


def copy_official(
    views: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    done: Callable[[torch.Tensor], None] = lambda tensor: None,
) -> None:
    """Copies `tensors`, which must fit, into `views` one by one. Calls `done` with each tensor after reading it.

    Raises `CheckpointError` for the first tensor that is not finite or would not be in the dtype of its view.
    """
    for key, view in views.items():
        if not _copied_finite(view.detach(), fitted(tensors[key], tuple(view.shape))):
            check_finite(key, tensors[key], view.dtype)
        done(tensors[key])


def _copied_finite(view: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Copies `tensor` into `view`. Returns False if a copied number may be NaN or infinite.

    Checks each piece while it is in the processor's cache: a finite sum shows that all its numbers are finite.
    """
    if not (view.is_cpu and view.is_contiguous() and tensor.is_contiguous()):
        view.copy_(tensor)
        return False
    sums = []
    for target, source in zip(view.view(-1).split(_PIECE), tensor.view(-1).split(_PIECE), strict=True):
        sums.append(_wide(target.copy_(source)).sum())
    return bool(torch.stack(sums).isfinite().all())


def _copy(views: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for key, view in views.items():
            view.copy_(fitted(tensors[key], tuple(view.shape)))


def check_finite(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises `CheckpointError` if a number of `tensor` is NaN or infinite, or becomes infinite in `dtype`."""
    if not tensor.numel():
        return
    extremes = torch.stack(torch.aminmax(_wide(tensor.detach())))  # NaN if any number is NaN; one pass without a copy
    if not extremes.isfinite().all():
        raise CheckpointError(
            f"{key} has values that are not finite (NaN or infinite), so every result would be wrong; nothing was "
            "loaded\n  remedy: use an undamaged copy, or a checkpoint from before the training diverged"
        )
    if not _wide(extremes.to(dtype)).isfinite().all():
        raise CheckpointError(
            f"{key} has values up to {extremes.abs().max().item():.4g}, which are infinite in "
            f"{str(dtype).removeprefix('torch.')}; nothing was loaded\n  remedy: use bfloat16 or float32"
        )


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """e4m3 numbers in float32, because PyTorch cannot compare or add them."""
    return tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor


def fitted(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`tensor`, or, for position embeddings of another resolution, a copy in float32 that is resized to `shape`."""
    if tuple(tensor.shape) == shape:
        return tensor
    width = shape[1]
    old, new = math.isqrt(tensor.shape[0] - 1), math.isqrt(shape[0] - 1)
    class_token, grid = tensor[:1].float(), tensor[1:].float().reshape(1, old, old, width).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(new, new), mode="bilinear", align_corners=False)
    return torch.cat([class_token, grid.permute(0, 2, 3, 1).reshape(new * new, width)])


def check_dtypes(
    fit: Fit, tensors: Mapping[str, torch.Tensor], exact: Mapping[str, torch.dtype] = MappingProxyType({})
) -> None:
    """Raises `CheckpointError` for needed entries with a dtype that weights cannot have. `exact` are dtypes of 8-bit
    weights and their scales."""
    found = {key: tensors[key].dtype for key in fit.needed}
    other = [f"{key} ({dtype}, needed {exact[key]})" for key, dtype in found.items() if dtype != exact.get(key, dtype)]
    if other:
        raise CheckpointError(
            f"{len(other)} entries do not have the dtypes of 8-bit weights and their scales, such as {other[0]}; "
            "nothing was loaded\n  remedy: convert the original checkpoint again"
        )
    wrong = [f"{key} ({dtype})" for key, dtype in found.items() if key not in exact and dtype not in WEIGHT_DTYPES]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} entries are not floating point of 16 bits or more and cannot be weights, such as "
            f"{wrong[0]}; nothing was loaded\n  remedy: use a checkpoint that is not quantised"
        )


def check_twins(
    fit: Fit,
    names: OfficialNames,
    tensors: Mapping[str, torch.Tensor],
    done: Callable[[torch.Tensor], None] = lambda tensor: None,
) -> None:
    """Raises `CheckpointError` if tied entries differ. Calls `done` with each tensor after reading it."""
    for key in fit.tied:
        twin = names.tied[key]
        same = torch.equal(tensors[key], tensors[twin].to(tensors[key].dtype))
        done(tensors[key])
        done(tensors[twin])
        if not same:
            raise CheckpointError(
                f"{key} differs from {twin}, and the model has one tensor for both; nothing was loaded\n"
                f"  remedy: find out which one training used, and remove {key} if it is {twin}"
            )


def plain_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entries under their official names. Parts that module wrappers add to names are removed anywhere.

    Raises `CheckpointError` unless it is a flat state dict of a whole model with merged adapters.
    """
    plain: dict[str, Any] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(f"keys of a state dict must be names, got {printable(repr(key))}")
        if isinstance(value, Mapping) and key in ("model", "module", "state_dict"):
            raise CheckpointError(f"this is a whole checkpoint, not a state dict: pass its {key!r} entry")
        if len(key) > _MAX_NAME or not key.isprintable():
            raise CheckpointError(f"an entry has an impossible name: {printable(repr(key))}; remove it")
        if found := _UNMERGED.search(key):
            raise CheckpointError(f"{printable(key)}: {_UNMERGED_REMEDIES[found[0]]}")
        name = _plain_name(key)
        if name in plain:
            raise CheckpointError(
                f"{printable(name)} exists twice, with and without a part such as 'module.' or '.bert': remove one"
            )
        plain[name] = value
    empty = [key for key, value in plain.items() if isinstance(value, torch.Tensor) and not value.numel()]
    if len(empty) > len(plain) / 2:
        raise CheckpointError(
            f"{len(empty)} of {len(plain)} entries are empty, such as {printable(empty[0])}: DeepSpeed's ZeRO-3 stores "
            "the weights in other files; gather them with zero_to_fp32.py"
        )
    return plain


def _plain_name(key: str) -> str:
    parts = [part for part in key.split(".") if part not in _WRAPPERS] or [key]
    while len(parts) > 1 and parts[0] in _OUTER:
        del parts[0]
    name = ".".join(parts)
    for other, ours in _SPELLINGS.items():
        if name.startswith(other):
            return ours + name.removeprefix(other)
    return name


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
            raise CheckpointError(f"{key} is on the meta device and has no values: load it onto the CPU first")
        if value.is_nested or value.is_quantized or value.layout != torch.strided:
            kind = "nested" if value.is_nested else "quantised" if value.is_quantized else "sparse"
            raise CheckpointError(f"{key} is a {kind} tensor, and weights are dense: convert it first")
        return value.detach()
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub":
        array = np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    raise CheckpointError(f"{key} is neither a tensor nor a NumPy array of numbers, but {type(value).__name__}")
