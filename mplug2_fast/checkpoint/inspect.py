"""Describes a checkpoint: format, tasks, sizes, dtypes, and which entries are missing, unexpected or unused."""

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
    """The description of a checkpoint.

    Attributes:
        path: the file or directory.
        container: its format, in words.
        file_bytes: size of the file with the weights.
        entries: number of tensors in its state dict.
        parameters: number of their elements.
        dtypes: dtype name -> number of tensors.
        entry: the top-level entry with the weights, or None if the file is a bare state dict.
        others: other top-level entries, such as optimizer state.
        vocabulary: whether the directory has its own vocabulary.
        family: the model family. size: the name of the published size, if it is one.
        tasks: the tasks that `groups` refers to; empty if the sizes are unknown.
        servable: all tasks of this package whose weights are complete.
        config: the sizes, or None if they cannot be determined.
        weights: "int8" or "fp8", if linear layers have 8-bit weights. Otherwise None.
        keep: the patterns of linear layers that do not have them. Otherwise None.
        assumed: dotted field -> official default, for fields that the file does not determine.
        needed_parameters: number of elements that the tasks use.
        groups: the entries by kind and subtree.
        problem: why it cannot be loaded for `tasks`, or None if it can.
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
    size: str | None = None
    tasks: tuple[str, ...] = ()
    servable: tuple[str, ...] = ()
    config: Any = None
    weights: str | None = None
    keep: tuple[str, ...] | None = None
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
        """Whether it can be loaded for `tasks`, judged by names, shapes and dtypes."""
        return self.problem is None

    def counts(self) -> dict[str, int]:
        """Kind -> number of keys."""
        counts: dict[str, int] = {}
        for group in self.groups:
            counts[group.kind] = counts.get(group.kind, 0) + group.keys
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values for JSON."""
        return asdict(self) | {"task": self.task, "ok": self.ok, "counts": self.counts()}


def inspect(path: str | Path, task: Tasks = None, config: Any = None) -> Inspection:
    """Describes a checkpoint without reading its weights.

    For a readable file that is not a checkpoint of a known family, `problem` is set. A file that cannot be read raises
    `CheckpointError`, as in `from_pretrained`. An unknown task raises `ConfigError`.
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
        "weights": source.quantisation and source.quantisation.weights,
        "keep": source.quantisation and source.quantisation.keep,
        "vocabulary": vocabulary_path(path) is not None,
    }
    try:
        resolved = resolve(source, task, config)
    except CheckpointError as error:
        return Inspection(**described, groups=_groups(source, {"unexpected": source.tensors}), problem=str(error))
    return Inspection(
        **described,
        family=resolved.family.title,
        size=_size(resolved.config),
        tasks=tuple(each.name for each in resolved.tasks),
        servable=resolved.servable,
        config=resolved.config,
        assumed=resolved.assumed,
        needed_parameters=sum(source.tensors[key].numel() for key in resolved.fit.needed),
        groups=_fit_groups(source, resolved.fit),
        problem=_problem(source, resolved),
    )


def _size(config: Any) -> str | None:
    """The preset with these layers and widths."""
    for name in config.presets:
        preset = config.preset(name)
        same = ("width", "layers", "patch_size")
        if all(getattr(preset.vision, field) == getattr(config.vision, field) for field in same) and (
            preset.text.hidden_size == config.text.hidden_size
        ):
            return name
    return None


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
