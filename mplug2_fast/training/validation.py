"""Scores on held-out items during training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mplug2_fast.datasets import Item, read_items
from mplug2_fast.errors import ConfigError, VideoError
from mplug2_fast.evaluation import Prediction, evaluate, score
from mplug2_fast.predict import Predictor
from mplug2_fast.tasks import Task, load
from mplug2_fast.training.data import ItemDataset, Sample, video_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from mplug2_fast.text import Tokenizer
    from mplug2_fast.training.recipe import Recipe

BATCH_SIZE = 16


class Validator:
    """Predicts items of a data set and scores the predictions.

    Args:
        items: with references. task: what is predicted. config: of the model.
        metric: decides what is best; empty is the task's first one. options: of the task. origin: of the items.
    """

    def __init__(
        self, items: list[Item], task: Task, config: Any, metric: str, options: dict[str, Any], origin: str
    ) -> None:
        self.task, self.metric = task, metric or (task.metrics[0] if task.metrics else "")
        if not self.metric:
            raise ConfigError(f"{task.name} has no metrics: name one in validation.metric")
        preparation = task.preparation(config)
        self._data = ItemDataset(
            items, [task], config.vision, augment=None, split_targets=False, preparation=preparation
        )
        self._options, self._origin = options, origin

    @classmethod
    def of(cls, recipe: Recipe, config: Any) -> Self | None:
        """The validator of a recipe, if it has one."""
        settings = recipe.validation
        if settings is None:
            return None
        items = read_items(settings.data, settings.split or None)
        return cls(items, load(settings.task), config, settings.metric, settings.options, settings.data)

    def report(self, model: Any, tokenizer: Tokenizer, folder: Path) -> dict[str, float]:
        """Evaluate all items, write the report into a folder, and return metric -> value."""
        shutil.rmtree(folder, ignore_errors=True)  # of the same run, with older weights
        predictor = Predictor(model, tokenizer, task=self.task)
        report = evaluate(predictor, self._data.items, folder, options=self._options, data=self._origin)
        return report.metrics

    def scores(self, model: Any, tokenizer: Tokenizer, device: torch.device, max_items: int = 0) -> dict[str, float]:
        """Metric -> value over the first `max_items` items, or over all."""
        respond = self.task.respond(model, tokenizer, **self._options)
        count = min(max_items or len(self._data), len(self._data))
        items = self._data.samples[:count]
        predictions: list[Prediction] = [None] * count
        for start in range(0, count, BATCH_SIZE):
            read: dict[int, Sample] = {}
            for index in range(start, min(start + BATCH_SIZE, count)):
                try:
                    read[index] = self._data.sample(index, np.random.default_rng(0))
                except VideoError:
                    continue
                items[index] = read[index].item
            if not read:
                continue
            with torch.inference_mode():
                video = video_of(list(read.values()), model.config.vision.image_size).to(device)
                found = respond(model.encode_video(video), [self.task.text_of(items[i], model.config) for i in read])
            for index, texts in zip(read, found, strict=True):
                predictions[index] = texts
        return score(self.task, predictions, items)
