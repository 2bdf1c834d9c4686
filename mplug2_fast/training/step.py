"""The losses of one part of a step, as one module, which is wrapped to run on several ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mplug2_fast.training.data import Batch
from mplug2_fast.training.scst import self_critical_loss


class Part(NamedTuple):
    """A part of a source's batch.

    Attributes:
        batch: on the model's device.
        shares: task -> share of the step's targets that are here. weights: task -> weight of its loss.
        objective: "loss" or "scst". options: task -> options of its loss.
    """

    batch: Batch
    shares: Mapping[str, float]
    weights: Mapping[str, float]
    objective: str = "loss"
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


class TrainingStep(nn.Module):
    """A model, a momentum copy of it as its teacher if there is distillation, and the training states of its tasks.

    Args:
        model: the trained model.
        momentum: of the teacher; None for no teacher.
        states: task -> its training state.
    """

    def __init__(
        self, model: nn.Module, momentum: float | None = None, states: Mapping[str, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.states = nn.ModuleDict(states or {})
        self._momentum = momentum
        self._teacher = None
        if momentum is not None:
            self._teacher = copy.deepcopy(model).requires_grad_(False)

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher

    @torch.no_grad()
    def update(self) -> None:
        """Moves the teacher and the states towards the model: copy = momentum · copy + (1 - momentum) · model."""
        for state in self.states.values():
            state.update(self.model)
        if self._teacher is not None:
            own = list(self.model.parameters())
            torch._foreach_lerp_(list(self._teacher.parameters()), own, 1 - (self._momentum or 0.0))

    def forward(
        self, parts: Sequence[Part], alpha: float = 0.0, reward: Any = None, queue_alpha: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, and each task's loss, all times their shares of the targets.

        Args:
            parts: one of each source. alpha: weight of the teacher's soft targets. reward: of generated captions.
            queue_alpha: weight of the soft targets of tasks with a state.
        """
        total, losses = [], {}
        for part in parts:
            tensors = part.batch.tensors
            video = next(iter(tensors.values())).get("video")
            if len(tensors) > 1 and video is not None and not self.states.keys() & tensors.keys():
                embeds = self.model.encode_video(video)
                tensors = {
                    name: {**{key: value for key, value in batch.items() if key != "video"}, "image_embeds": embeds}
                    for name, batch in tensors.items()
                }
            for name, batch in tensors.items():
                options = part.options.get(name, {})
                if part.objective == "scst":
                    loss = self_critical_loss(self.model, batch, part.batch.items, reward)
                elif name in self.states:
                    loss = self.model.loss(name, batch, state=self.states[name], alpha=queue_alpha, **options)
                elif self._teacher is None or not self.model.tasks[name].soft_targets:
                    loss = self.model.loss(name, batch, **options)
                else:
                    with torch.no_grad():
                        given = batch if video is None else {**batch, "video": video, "image_embeds": None}
                        soft = self.model.tasks[name].logits(self._teacher, given)
                    loss = self.model.tasks[name].loss(self.model, batch, soft=soft, alpha=alpha)
                loss = loss * part.shares[name]
                total.append(loss * part.weights[name])
                losses[name] = losses.get(name, 0.0) + loss.detach()
        return torch.stack(total).sum(), losses
