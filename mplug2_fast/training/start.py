"""The start of a run: its tokenizer, its model, and the parameters that are trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mplug2_fast.checkpoint import from_pretrained, vocabulary_path
from mplug2_fast.checkpoint.resolve import resolve
from mplug2_fast.checkpoint.source import open_checkpoint
from mplug2_fast.errors import ConfigError
from mplug2_fast.models import FAMILIES
from mplug2_fast.tasks import Task
from mplug2_fast.text import Tokenizer
from mplug2_fast.training.initial import scale_preserving
from mplug2_fast.training.optimizer import matching
from mplug2_fast.training.recipe import Model


def tokenizer_of(chosen: Model) -> Tokenizer:
    """The tokenizer of the recipe's vocabulary, or else of the checkpoint."""
    path = chosen.vocabulary or (vocabulary_path(chosen.checkpoint) if chosen.checkpoint else None)
    return Tokenizer.from_vocab(path)


def new_model(chosen: Model, tasks: Sequence[Task], vocab_size: int, device: torch.device) -> nn.Module:
    """The model of a checkpoint, or one with random weights."""
    if chosen.checkpoint:
        config = None
        if chosen.config:
            config = resolve(open_checkpoint(chosen.checkpoint), tasks, None).config.replace(**chosen.config)
        options = {"tasks": tasks, "config": config, "device": device, "new_heads": chosen.new_heads}
        return from_pretrained(chosen.checkpoint, pack=False, **options)
    family = FAMILIES[chosen.family]
    config = family.config.preset(chosen.preset).replace(vocab_size=vocab_size, **chosen.config)
    model = family.build(config, tasks, device, torch.float32)
    if chosen.init == "scaled":
        scale_preserving(model)
    return model


def freeze(model: nn.Module, chosen: Model) -> None:
    """Freezes the parameters that match `freeze`, and those that `train_only`, if given, does not match.

    Raises `ConfigError` for a pattern without a match, and for one that matches a part of a parameter.
    """
    if not chosen.freeze and not chosen.train_only:
        return
    official: dict[str, list[str]] = {}
    for entry in model.official_names.entries:
        official.setdefault(entry.path, []).append(entry.official)
    names = [name for group in official.values() for name in group]
    try:
        frozen = matching(names, chosen.freeze)
        if chosen.train_only:
            frozen |= set(names) - matching(names, chosen.train_only)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for name, parameter in model.named_parameters():
        count = sum(each in frozen for each in official[name])
        if 0 < count < len(official[name]):
            raise ConfigError(f"{', '.join(official[name])} are one parameter here: freeze all of them or none")
        parameter.requires_grad_(not count)
