"""Build a fast model from a checkpoint file, holding little more than the model itself in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mplug2_fast.checkpoint.load import copy_released
from mplug2_fast.checkpoint.pages import PageReleaser
from mplug2_fast.checkpoint.resolve import require_twins, resolve
from mplug2_fast.checkpoint.source import open_checkpoint
from mplug2_fast.devices import pick_device, pick_dtype
from mplug2_fast.errors import CheckpointError
from mplug2_fast.models.mplug2.config import MPlug2Config, Task

if TYPE_CHECKING:
    from mplug2_fast.models.mplug2 import MPlug2ForCaptioning, MPlug2ForQuestionAnswering


def from_pretrained(
    path: str | Path,
    task: Task | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    config: MPlug2Config | None = None,
    *,
    pack: bool = True,
) -> MPlug2ForCaptioning | MPlug2ForQuestionAnswering:
    """A fast model in eval mode, filled from a checkpoint. Only what the task needs is read, tensor by tensor.

    Args:
        path: a released `.pth` (its weights under `model` or `module`, or alone), a directory with config.json and
            model.safetensors, or a `.safetensors` with released names.
        task: None takes the one that the file states, else question answering where its parts are there (the model's
            `captioner()` shares them), else captioning.
        dtype: of the parameters, whatever the file's, or its name; None is torch's default dtype.
        device: None is the CPU.
        config: overrides what the file says and its shapes tell; with another image size, position embeddings are
            resized as `load_released` does.
        pack: whether to call the model's `pack()`, which makes it faster on a CPU and larger by half.

    Raises `CheckpointError`, naming the file, the reason and the remedy, when the file cannot be read, would run code,
    or does not hold exactly such a model; `ConfigError` for a task, a dtype or a device that does not exist.
    """
    from mplug2_fast.models import mplug2 as models

    dtype = pick_dtype(dtype, torch.device("cpu")) if isinstance(dtype, str) else dtype or torch.get_default_dtype()
    device = pick_device(device or "cpu")
    source = open_checkpoint(path)
    resolved = resolve(source, task, config)
    resolved.require(source)
    release = PageReleaser(source.file)
    require_twins(source, resolved.fit, release)
    kind = models.MPlug2ForCaptioning if resolved.task == "captioning" else models.MPlug2ForQuestionAnswering
    built = kind(resolved.config, device="meta", dtype=dtype)
    built = built.to_empty(device=device)
    try:
        copy_released(built.released_parameters(), source.tensors, release)
    except CheckpointError as error:
        raise CheckpointError(f"{source.name}: {error}") from error
    return built.pack().eval() if pack else built.eval()
