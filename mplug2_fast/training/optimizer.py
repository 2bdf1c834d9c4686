"""AdamW with the official parameter groups, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mplug2_fast.errors import ConfigError
from mplug2_fast.training.recipe import Optimizer, Schedule

VISION = "visual_encoder."
"""Official names with this prefix have the vision encoder's learning rate."""


def make_optimizer(model: nn.Module, names: dict[str, str], settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over the parameters of `model` that are trained.

    Args:
        model: the model.
        names: parameter name -> an official name of it. Parameters without one, such as adapters, have their own name.
        settings: learning rates and weight decay. Group `base` is the rate before the schedule.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        official = names.get(name, name)
        vision = official.startswith(VISION) and settings.vision_learning_rate is not None
        rate = settings.vision_learning_rate if vision else settings.learning_rate
        decay = settings.weight_decay if _decays(official, parameter, settings) else 0.0
        groups.setdefault((rate or 0.0, decay), []).append(parameter)
    described: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "weight_decay": decay, "base": rate}
        for (rate, decay), parameters in groups.items()
    ]
    if not described:
        raise ConfigError("no parameter is trained: check train_only and freeze")
    return torch.optim.AdamW(described, betas=settings.betas, eps=settings.eps, fused=True)


def _decays(official: str, parameter: nn.Parameter, settings: Optimizer) -> bool:
    if settings.decay == "matrices":
        return parameter.ndim > 1
    return "bias" not in official and "LayerNorm.weight" not in official


_STAIR = 100
"""Steps between changes of the rate in the first epoch of the schedule `epochs`."""


def set_learning_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, steps: int) -> float:
    """Set the rates of step `step`, from 0, of `steps`. Returns the largest."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(group["base"], schedule, step, steps)
    return max(group["lr"] for group in optimizer.param_groups)


def learning_rate(base: float, schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate of step `step`, from 0, of `steps`."""
    warmup = schedule.warmup_steps
    if schedule.kind == "epochs":
        return _by_epochs(base, schedule, step, steps)
    if step < warmup:
        start = schedule.warmup_learning_rate
        return start + (base - start) * (step + 1) / warmup
    lowest = min(base, schedule.min_learning_rate)
    if schedule.kind == "constant":
        return base
    done = (step - warmup) / max(1, steps - warmup)
    return lowest + (base - lowest) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _by_epochs(base: float, schedule: Schedule, step: int, steps: int) -> float:
    """The schedule of mPLUG's official training loops."""
    epoch = step // schedule.steps_per_epoch
    if epoch == 0:
        stairs = schedule.warmup_steps // _STAIR
        start = schedule.warmup_learning_rate
        return start + (base - start) * (min(step // _STAIR, stairs) / stairs if stairs else 1.0)
    epochs = math.ceil(steps / schedule.steps_per_epoch)
    lowest = schedule.min_learning_rate
    return lowest + (base - lowest) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def official_of_parameters(model: Any) -> dict[str, str]:
    """Parameter name -> an official name of it. All official names that one parameter holds are of one group."""
    return {entry.path: entry.official for entry in model.official_names.entries}


def matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that match any of the shell patterns.

    Raises:
        ValueError: a pattern matches no name.
    """
    from fnmatch import fnmatchcase

    names, found = list(names), set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise ValueError(f"the pattern {pattern!r} matches no official parameter name, such as {names[0]}")
        found |= hits
    return found
