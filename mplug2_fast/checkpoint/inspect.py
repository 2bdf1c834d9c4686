"""Describe a checkpoint: its form, tasks, sizes and dtypes, and what is missing, unexpected or unused in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mplug2_fast.checkpoint.fit import Fit, group_of
from mplug2_fast.checkpoint.load import dtypes_of
from mplug2_fast.checkpoint.resolve import Resolved, Tasks, resolve
from mplug2_fast.checkpoint.source import Source, open_checkpoint, vocabulary_path
from mplug2_fast.errors import CheckpointError
from mplug2_fast.models.names import Shape


@dataclass(frozen=True)
class KeyGroup:
    """The entries of one kind under one subtree."""

    kind: str
    """needed, missing, mismatched, unexpected, unused, tied or momentum"""
    name: str
    keys: int
    parameters: int
    example: str


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        path: the file or directory.
        container: its form, in words.
        file_bytes: size on disk of the file with the weights.
        entries: tensors in its state dict.
        parameters: numbers in those.
        dtypes: dtype name -> tensors.
        entry: the top-level entry that the weights are from; None where they are alone.
        others: what else the file holds, such as optimizer state.
        vocabulary: whether it has its own vocabulary beside it.
        family: its family. tasks: the tasks that the groups below refer to; empty when the sizes are unknown.
        servable: every task of this package that there are weights for.
        config: the sizes; None when they cannot be told.
        assumed: dotted field -> released default, for fields that nothing in the file tells.
        needed_parameters: numbers that the tasks read.
        groups: the entries by kind and subtree.
        problem: the report of why it cannot be loaded for `tasks`; None when it can.
    """

    path: str
    container: str
    file_bytes: int
    entries: int
    parameters: int
    dtypes: dict[str, int]
    entry: str | None = None
    others: tuple[str, ...] = ()
    vocabulary: bool = False
    family: str | None = None
    tasks: tuple[str, ...] = ()
    servable: tuple[str, ...] = ()
    config: Any = None
    assumed: dict[str, Any] = field(default_factory=dict)
    needed_parameters: int = 0
    groups: tuple[KeyGroup, ...] = ()
    problem: str | None = None

    @property
    def task(self) -> str | None:
        """The first of `tasks`."""
        return next(iter(self.tasks), None)

    @property
    def ok(self) -> bool:
        """Whether it can be loaded for `tasks`, as far as names, shapes and dtypes tell."""
        return self.problem is None

    def counts(self) -> dict[str, int]:
        """Kind -> number of keys."""
        counts: dict[str, int] = {}
        for group in self.groups:
            counts[group.kind] = counts.get(group.kind, 0) + group.keys
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, ready for JSON."""
        return asdict(self) | {"task": self.task, "ok": self.ok, "counts": self.counts()}


def inspect(path: str | Path, task: Tasks = None, config: Any = None) -> Inspection:
    """Describe a checkpoint without reading its weights.

    A readable file that is not a checkpoint of a known family gives an `Inspection` with `problem`; one that cannot be
    read at all raises `CheckpointError`, as in `from_pretrained`. `ConfigError` for a task that does not exist.
    """
    source = open_checkpoint(path)
    described = {
        "path": str(source.path),
        "container": source.container,
        "file_bytes": source.file.stat().st_size,
        "entries": len(source.tensors),
        "parameters": sum(tensor.numel() for tensor in source.tensors.values()),
        "dtypes": dtypes_of(source.tensors.values()),
        "entry": source.entry,
        "others": source.others,
        "vocabulary": vocabulary_path(path) is not None,
    }
    try:
        resolved = resolve(source, task, config)
    except CheckpointError as error:
        return Inspection(**described, groups=_groups(source, {"unexpected": source.tensors}), problem=str(error))
    return Inspection(
        **described,
        family=resolved.family.title,
        tasks=tuple(each.name for each in resolved.tasks),
        servable=resolved.servable,
        config=resolved.config,
        assumed=resolved.assumed,
        needed_parameters=sum(source.tensors[key].numel() for key in resolved.fit.needed),
        groups=_fit_groups(source, resolved.fit),
        problem=_problem(source, resolved),
    )


def _problem(source: Source, resolved: Resolved) -> str | None:
    try:
        resolved.require(source)
    except CheckpointError as error:
        return str(error)
    return None


def _fit_groups(source: Source, fit: Fit) -> tuple[KeyGroup, ...]:
    kinds = ("needed", "missing", "mismatched", "unexpected", "unused", "tied", "momentum")
    return _groups(source, {kind: getattr(fit, kind) for kind in kinds}, fit.missing)


def _groups(
    source: Source, kinds: dict[str, Iterable[str]], missing: Mapping[str, Shape] = MappingProxyType({})
) -> tuple[KeyGroup, ...]:
    sizes = {key: math.prod(shape) for key, shape in missing.items()}
    sizes |= {key: tensor.numel() for key, tensor in source.tensors.items()}
    groups = []
    for kind, keys in kinds.items():
        members: dict[str, list[str]] = {}
        for key in keys:
            members.setdefault(group_of(key), []).append(key)
        for name, inside in members.items():
            groups.append(KeyGroup(kind, name, len(inside), sum(sizes[key] for key in inside), inside[0]))
    return tuple(groups)
