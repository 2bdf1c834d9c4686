"""A model family, as the rest of the package uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mplug2_fast.models.config import Config
from mplug2_fast.models.names import OfficialNames, Shape


@dataclass(frozen=True)
class InferredConfig:
    """Sizes found in a state dict.

    Attributes:
        config: the whole configuration.
        modules: the modules that the state dict has. A module counts when its first parts are there, so that a single
            missing entry is reported as missing and does not hide the module.
        assumed: dotted field -> value, for fields that neither the shapes nor the file's own configuration determine,
            and that have the official default.
        undetermined: dotted field -> the module that needs it, for fields without an official default at this size. A
            wrong guess would load without an error and give noise.
    """

    config: Any
    modules: frozenset[str]
    assumed: dict[str, Any]
    undetermined: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        config: its configuration class, with its title and its presets.
        names: (configuration, modules) -> official names.
        recognise: how many of the entries that determine the sizes a state dict has.
        infer: (shapes, the checkpoint's own `config` entry) -> configuration.
        build: (configuration, tasks, device, dtype) -> model.
        spellings: other beginnings of official names -> the ones that we use.
        marks: entry that only files of one task have -> the name of the task.
    """

    config: type[Config]
    names: Callable[[Any, frozenset[str]], OfficialNames]
    recognise: Callable[[Mapping[str, Shape]], int]
    infer: Callable[[Mapping[str, Shape], Mapping[str, Any]], InferredConfig]
    build: Callable[..., nn.Module]
    spellings: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Its name for people."""
        return self.config.title
