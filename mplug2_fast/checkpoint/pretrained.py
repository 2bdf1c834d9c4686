"""Builds a fast model from a checkpoint file, with little more memory than the model needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from mplug2_fast.checkpoint.eight_bit import check_numbers, device_of, others_dtype, read_rounded, rounding
from mplug2_fast.checkpoint.load import copy_official
from mplug2_fast.checkpoint.pages import PageReleaser
from mplug2_fast.checkpoint.resolve import Tasks, require_twins, resolve
from mplug2_fast.checkpoint.source import Source, open_checkpoint
from mplug2_fast.devices import eight_bit, pick_device, pick_dtype
from mplug2_fast.errors import CheckpointError, ConfigError
from mplug2_fast.models.eight_bit import Quantisation
from mplug2_fast.tasks import Task

if TYPE_CHECKING:
    from mplug2_fast.models.mplug2 import MPlug2, MPlug2ForCaptioning, MPlug2ForQuestionAnswering


@overload
def from_pretrained(
    path: str | Path, task: Literal["captioning"], *args: Any, **options: Any
) -> MPlug2ForCaptioning: ...


@overload
def from_pretrained(
    path: str | Path, task: Literal["question_answering"], *args: Any, **options: Any
) -> MPlug2ForQuestionAnswering: ...


@overload
def from_pretrained(path: str | Path, task: Task | str | None = None, *args: Any, **options: Any) -> MPlug2: ...


def from_pretrained(
    path: str | Path,
    task: Task | str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    config: Any = None,
    *,
    tasks: Sequence[Task | str] | None = None,
    keep: Sequence[str] = (),
    pack: bool = True,
    new_heads: bool = False,
) -> Any:
    """Loads a fast model from a checkpoint, in eval mode. Reads only what its tasks need, tensor by tensor.

    Args:
        path: an official `.pth` (weights under `model` or `module`, or a bare state dict), a directory with
            config.json and model.safetensors, a `.safetensors` with official names, or `owner/name[@revision]` on the
            Hugging Face Hub.
        task: one task, by name or as an object. tasks: several. Without either: as the file says, or else the task
            with the most modules among those whose weights are complete.
        dtype: of the parameters, as a dtype or its name. None: torch's default dtype. "auto": see `pick_dtype`.
            "int8", "fp8": linear layers get 8-bit weights, for a CPU and for a GPU of compute capability 8.9 or later,
            see `Model.quantise`. Other weights are bfloat16 if the device multiplies it, otherwise float32. A file with
            8-bit weights can only be loaded so.
        device: None: the CPU. "auto": see `pick_device`; the CPU for int8.
        config: overrides what the file says and what its shapes imply. For another image size, position embeddings
            are resized as in `load_official`.
        keep: with 8-bit weights, patterns of layers that are not rounded: see `Model.quantise`.
        new_heads: whether heads that the file lacks get new weights, to be trained. Otherwise they are an error.
        pack: whether to call the model's `pack()`, which makes it faster on a CPU but 50% larger.

    Returns an `MPlug2`. If the task is one of the official checkpoints', it is an `MPlug2ForCaptioning` or an
    `MPlug2ForQuestionAnswering`.

    Raises `CheckpointError` if the file cannot be read, would run code, or does not hold exactly such a model. The
    message has the file, the reason and the remedy. Raises `ConfigError` for an unknown task, dtype or device.
    """
    if task is not None and tasks is not None:
        raise ConfigError("give either task or tasks")
    place = pick_device(device or "cpu")
    if isinstance(dtype, str) and eight_bit(dtype) is None:
        pick_dtype(dtype, place)
    source = open_checkpoint(path)
    quantisation = rounding(source.name, source.quantisation, dtype, keep)
    if quantisation is not None:
        place = device_of(quantisation.weights, device)
        if new_heads:
            raise ConfigError("new heads must be trained, and a model with 8-bit weights cannot be")
        built = read(source, task or tasks, config, others_dtype(place), place, quantisation=quantisation)
    else:
        dtype = pick_dtype(dtype, place) if isinstance(dtype, str) else dtype or torch.get_default_dtype()
        built = read(source, task or tasks, config, dtype, place, new_heads=new_heads)
    return built.pack().eval() if pack else built.eval()


def read(
    source: Source,
    tasks: Tasks,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantisation: Quantisation | None = None,
    new_heads: bool = False,
) -> Any:
    """The model of an opened checkpoint. `quantisation`: of its weights, which the file may have or not."""
    resolved = resolve(source, tasks, config)
    fresh = resolved.fit.missing_heads() if new_heads else frozenset()
    if fresh:
        missing = {key: shape for key, shape in resolved.fit.missing.items() if key not in fresh}
        resolved = replace(resolved, fit=replace(resolved.fit, missing=missing))
    resolved.require(source)
    release = PageReleaser(source.file)
    require_twins(source, resolved, release)
    built = resolved.family.build(resolved.config, resolved.tasks, "meta", dtype)
    try:
        if quantisation is not None and source.quantisation is None:
            return read_rounded(built.eval(), quantisation, source.tensors, dtype, release).to(device)
        if quantisation is not None:
            built = built.eval().quantise(quantisation.keep, quantisation.weights, check=False)
        built = built.to_empty(device=device)
        if fresh:
            built.reset_parameters()
        views = {key: view for key, view in built.official_parameters().items() if key not in fresh}
        copy_official(views, source.tensors, release)
        check_numbers(resolved.names.dtypes, views)
    except CheckpointError as error:
        raise CheckpointError(f"{source.name}: {error}") from error
    return built
