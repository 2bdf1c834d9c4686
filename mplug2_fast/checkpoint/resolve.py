"""Decides how a checkpoint is loaded: its family, sizes and tasks, and how its entries fit them."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mplug2_fast.checkpoint.fit import Fit, check_fit
from mplug2_fast.checkpoint.load import check_dtypes, check_twins, servable_tasks, shapes_of
from mplug2_fast.checkpoint.source import Source
from mplug2_fast.errors import CheckpointError, ConfigError, printable
from mplug2_fast.models import FAMILIES, Family, infer_config, official_names
from mplug2_fast.models.names import DECODER, FUSION, TEXT, VISION, OfficialNames
from mplug2_fast.tasks import TASKS, Stated, Task, get, title_of

_CHAIN = frozenset((VISION, TEXT, FUSION, DECODER))
"""Of several tasks that a file serves, the one with most of these modules is the default."""

Tasks = Task | str | Sequence[Task | str] | None
"""One task, several, or None for those that the file names."""


@dataclass(frozen=True)
class Resolved:
    """How a checkpoint is loaded.

    Attributes:
        family: the model family. config: the caller's, otherwise the file's, otherwise inferred from the shapes.
        tasks: the caller's, otherwise the file's, otherwise the task with the most modules whose weights are complete.
        names: the official names of a model for these tasks.
        fit: how the entries fit `names`.
        servable: names of all tasks whose weights are complete.
        assumed: dotted field -> official default, for fields that nothing determines.
        undetermined: dotted fields that a task needs, that nothing determines, and that have no official default.
    """

    family: Family
    config: Any
    tasks: tuple[Task, ...]
    names: OfficialNames
    fit: Fit
    servable: tuple[str, ...]
    assumed: dict[str, Any]
    undetermined: tuple[str, ...] = ()

    def require(self, source: Source) -> None:
        """Raises `CheckpointError` if names, shapes or dtypes show that the checkpoint cannot be loaded this way."""
        if self.undetermined:
            raise CheckpointError(
                f"{source.name}: {', '.join(self.undetermined)} cannot be inferred from the weights and has no default "
                f"at this size; pass config= with it{self._instead()}"
            )
        self.fit.require(source.name)
        try:
            check_dtypes(self.fit, source.tensors, self.names.dtypes)
        except CheckpointError as error:
            raise CheckpointError(f"{source.name}: {error}") from error

    def _instead(self) -> str:
        """A hint to load another task, which does not need the undetermined fields."""
        modules = self.config.modules_for(self.tasks)
        other = next((name for name in self.servable if self.config.modules_for([TASKS[name]]) < modules), None)
        return "" if other is None else f', or load it for task="{other}", which does not need it'


def resolve(source: Source, tasks: Tasks = None, config: Any = None) -> Resolved:
    """Determines family, configuration and tasks of an opened checkpoint. Does not raise if its entries do not fit.

    Raises:
        ConfigError: a task does not exist. CheckpointError: the sizes cannot be determined, or the file states a task
            that does not come with the package and that the caller did not pass.
    """
    given = [tasks] if isinstance(tasks, (str, Task)) else list(tasks or ())
    wanted = tuple(get(_by_name(source, each)) for each in given)
    shapes = shapes_of(source.tensors)
    assumed: dict[str, Any] = {}
    undetermined: dict[str, str] = {}
    config = config or source.config
    if config is None:
        try:
            inferred = infer_config(shapes, source.stated)
        except CheckpointError as error:
            raise CheckpointError(f"{source.name}: {error}") from error
        config, assumed, undetermined = inferred.config, inferred.assumed, inferred.undetermined
        possible = filter(config.has_modules_for, TASKS.values())
        servable = [task for task in possible if config.modules_for([task]) <= inferred.modules]
    else:
        servable = [TASKS[name] for name in servable_tasks(shapes, config)]
    wanted = wanted or _stated(source) or (_usual(servable, shapes, config),)
    names = official_names(config, wanted, source.quantisation)
    modules = config.modules_for(wanted)
    missing = tuple(name for name, module in undetermined.items() if module in modules)
    known = tuple(task.name for task in servable)
    fit = check_fit(shapes, names, title_of(wanted), known)
    return Resolved(FAMILIES[config.family], config, wanted, names, fit, known, assumed, missing)


def _by_name(source: Source, task: Task | str) -> Task | Stated:
    """The task, or what the file states under that name."""
    return next((each for each in source.tasks if isinstance(each, dict) and each.get("name") == task), task)


def _usual(servable: Sequence[Task], shapes: Container[str], config: Any) -> Task:
    """The task that an entry of the file marks, or else the task with the most modules."""
    marked = {task for key, task in FAMILIES[config.family].marks.items() if key in shapes}
    for task in servable:
        if task.name in marked:
            return task
    return max(servable, key=lambda task: len(task.modules & _CHAIN), default=next(iter(TASKS.values())))


def _stated(source: Source) -> tuple[Task, ...]:
    try:
        return tuple(map(get, source.tasks))
    except ConfigError as error:
        unknown = next((name for name in source.tasks if isinstance(name, str) and name not in TASKS), None)
        if unknown is None:
            raise CheckpointError(f"{source.name}: {error}") from error
        raise CheckpointError(
            f"{source.name}: its task {printable(unknown)} does not come with this package; pass the Task object: "
            "tasks=[...], or --task file.py:Name on the command line"
        ) from error


def require_twins(source: Source, resolved: Resolved, done: Callable[[torch.Tensor], None]) -> None:
    """Raises `CheckpointError` if tied entries differ. Calls `done` with each tensor after reading it."""
    try:
        check_twins(resolved.fit, resolved.names, source.tensors, done)
    except CheckpointError as error:
        raise CheckpointError(f"{source.name}: {error}") from error
