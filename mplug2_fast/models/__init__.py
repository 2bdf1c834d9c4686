"""One folder per model family, and the table of families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mplug2_fast.errors import CheckpointError
from mplug2_fast.models.eight_bit import Quantisation
from mplug2_fast.models.family import Family, InferredConfig
from mplug2_fast.models.mplug.family import MPLUG
from mplug2_fast.models.mplug2.family import MPLUG2
from mplug2_fast.models.names import OfficialNames, Shape, with_heads
from mplug2_fast.tasks import Task, get

FAMILIES: dict[str, Family] = {"mplug2": MPLUG2, "mplug": MPLUG}
"""Name, as configurations state it, to family."""

__all__ = ["FAMILIES", "Family", "InferredConfig", "infer_config", "official_names"]


def official_names(
    config: Any, tasks: Task | str | Sequence[Task | str], quantisation: Quantisation | None = None
) -> OfficialNames:
    """The official names of a model for these tasks, with their heads. Without `quantisation`, builds no model.

    Args:
        quantisation: of a model with 8-bit weights; the names have its scales too. None: wide weights.

    Raises:
        ConfigError: a task does not exist, or needs a module that the family does not have.
    """
    found = [get(task) for task in ([tasks] if isinstance(tasks, (str, Task)) else tasks)]
    modules = config.modules_for(found)
    if quantisation is not None:
        model: Any = FAMILIES[config.family].build(config, found, "meta", torch.float32)
        return model.eval().quantise(quantisation.keep, quantisation.weights, check=False).official_names
    with torch.device("meta"):
        heads = {task.name: head for task in found if (head := task.head(config)) is not None}
    return with_heads(FAMILIES[config.family].names(config, modules), heads)


def infer_config(shapes: Mapping[str, Shape], stated: Mapping[str, object] | None = None) -> InferredConfig:
    """The configuration behind an official state dict of any family.

    Args:
        shapes: official name -> shape, prefixes of wrappers already gone.
        stated: the `config` entry that training stores in a checkpoint. The shapes win over it.

    Raises:
        CheckpointError: the names are those of no family, or the entries that determine the sizes are missing or
            contradict each other.
    """
    scores = {name: family.recognise(shapes) for name, family in FAMILIES.items()}
    best = max(scores, key=lambda name: scores[name])
    if not scores[best]:
        titles = " or ".join(family.title for family in FAMILIES.values())
        raise CheckpointError(
            f"these are not the weights of an {titles} model\n"
            "  remedy: use a whole checkpoint, with its official key names"
        )
    return FAMILIES[best].infer(shapes, stated or {})
