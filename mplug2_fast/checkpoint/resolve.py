"""Decide what a checkpoint is to be loaded as: the sizes, the task, and how its entries fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mplug2_fast.checkpoint.fit import Fit, check_fit
from mplug2_fast.checkpoint.infer import infer_config
from mplug2_fast.checkpoint.load import check_dtypes, check_twins, shapes_of
from mplug2_fast.checkpoint.source import Source
from mplug2_fast.errors import CheckpointError, ConfigError
from mplug2_fast.models.mplug2.config import TASKS, MPlug2Config, Task


@dataclass(frozen=True)
class Resolved:
    """What a checkpoint is loaded as.

    Attributes:
        config: the sizes: the caller's, else the file's own, else those of the shapes.
        task: the caller's, else the file's own, else the widest that the weights serve.
        fit: how the entries fit `config` and `task`.
        tasks: every task that the weights are there for.
        assumed: dotted field -> released default, for fields that nothing tells.
        undetermined: dotted fields that `task` needs, that nothing tells, and that have no released default.
    """

    config: MPlug2Config
    task: Task
    fit: Fit
    tasks: tuple[Task, ...]
    assumed: dict[str, Any]
    undetermined: tuple[str, ...] = ()

    def require(self, source: Source) -> None:
        """Raise `CheckpointError` unless the checkpoint can be loaded so, as far as names, shapes and dtypes tell."""
        if self.undetermined:
            raise CheckpointError(
                f"{source.name}: {', '.join(self.undetermined)} is not told by shapes and has no released value at "
                'this size; pass config= with it, or load it for task="captioning", which does not need it'
            )
        self.fit.require(source.name)
        try:
            check_dtypes(self.fit, source.tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{source.name}: {error}") from error


def resolve(source: Source, task: Task | None = None, config: MPlug2Config | None = None) -> Resolved:
    """Settle configuration and task of an opened checkpoint; the fit is returned, not required.

    Raises `ConfigError` for a task that does not exist, `CheckpointError` when the sizes cannot be told.
    """
    if task is not None and task not in TASKS:
        raise ConfigError(f"no task {task!r}: choose one of {', '.join(TASKS)}")
    shapes = shapes_of(source.tensors)
    assumed: dict[str, Any] = {}
    undetermined: tuple[str, ...] = ()
    config = config or source.config
    if config is None:
        try:
            inferred = infer_config(shapes, source.released)
        except CheckpointError as error:
            raise CheckpointError(f"{source.name}: {error}") from error
        config, assumed, undetermined = inferred.config, inferred.assumed, inferred.undetermined
        tasks = inferred.tasks
    else:
        tasks = tuple(name for name in TASKS if not check_fit(shapes, config, name).missing)
    task = task or source.task or (tasks[-1] if tasks else "captioning")
    if task == "captioning":
        undetermined = ()
    return Resolved(config, task, check_fit(shapes, config, task), tasks, assumed, undetermined)


def require_twins(source: Source, fit: Fit, done: Callable[[torch.Tensor], None]) -> None:
    """Raise `CheckpointError` when tied twins in the file differ; `done` is told each tensor that was read."""
    try:
        check_twins(fit, source.tensors, done)
    except CheckpointError as error:
        raise CheckpointError(f"{source.name}: {error}") from error
