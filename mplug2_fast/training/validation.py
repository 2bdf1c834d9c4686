"""Scores on held-out items during training."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mplug2_fast.datasets import Item, read_items
from mplug2_fast.errors import ConfigError, DataError, VideoError
from mplug2_fast.evaluation import METRICS, Prediction, evaluate, score
from mplug2_fast.evaluation.gallery import PairRanks, Pairs, path_of
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
        metric: decides what is best; empty is the task's main one. options: of the task. origin: of the items.
    """

    def __init__(
        self, items: list[Item], task: Task, config: Any, metric: str, options: dict[str, Any], origin: str
    ) -> None:
        self.task, self.metric = task, metric or main_metric(task)
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
        """Evaluates all items, writes the report into a folder, and returns metric -> value."""
        shutil.rmtree(folder, ignore_errors=True)  # of the same run, with older weights
        predictor = Predictor(model, tokenizer, task=self.task)
        report = evaluate(predictor, self._data.items, folder, options=self._options, data=self._origin)
        return report.metrics

    def scores(self, model: Any, tokenizer: Tokenizer, device: torch.device, max_items: int = 0) -> dict[str, float]:
        """Metric -> value over the first `max_items` items, or over all."""
        count = min(max_items or len(self._data), len(self._data))
        if self.task.evaluation == "gallery":
            return self._gallery_scores(model, tokenizer, device, count)
        respond = self.task.respond(model, tokenizer, **self._options)
        items = self._data.samples[:count]
        predictions: list[Prediction] = [None] * count
        for read in self._read(range(count)):
            for index, sample in read.items():
                items[index] = sample.item
            with torch.inference_mode():
                embeds = _encoded(self.task, model, read, device)
                found = respond(embeds, [self.task.text_of(items[index], model.config) for index in read])
            for index, texts in zip(read, found, strict=True):
                predictions[index] = texts
        return score(self.task, predictions, items)

    def _gallery_scores(self, model: Any, tokenizer: Tokenizer, device: torch.device, count: int) -> dict[str, float]:
        """Metric -> value of the first items, ranked for each other."""
        items = self._data.samples[:count]
        pairs = Pairs.of(items)
        first = {path_of(item): index for index, item in reversed(list(enumerate(items)))}
        gallery = self.task.gallery(model, tokenizer, len(pairs.files), **self._options)
        numbers_of = {path: number for number, path in enumerate(pairs.files)}
        there: list[int] = []
        for read in self._read([first[path] for path in pairs.files]):
            with torch.inference_mode():
                finite = gallery.add(_encoded(self.task, model, read, device))
            numbers = [numbers_of[path_of(items[index])] for index in read]
            there += [number for number, good in zip(numbers, finite, strict=True) if good]
        if not there:
            raise DataError(f"{self._origin}: no file of the validation can be read")
        scores = gallery.scores(pairs.texts)
        return PairRanks.of(pairs, there, scores.by_visual, scores.by_text).metrics()

    def _read(self, indices: Sequence[int]) -> Iterator[dict[int, Sample]]:
        """The readable samples of these numbers, in batches."""
        for start in range(0, len(indices), BATCH_SIZE):
            read: dict[int, Sample] = {}
            for index in indices[start : start + BATCH_SIZE]:
                with contextlib.suppress(VideoError):
                    read[index] = self._data.sample(index, np.random.default_rng(0))
            if read:
                yield read


def main_metric(task: Task) -> str:
    """The value that decides between two models; empty if the task has no metrics."""
    if task.evaluation == "gallery":
        return "recall_mean"
    first = METRICS[task.metrics[0]] if task.metrics else None
    return "" if first is None else first.main or first.name


def _encoded(task: Task, model: Any, read: Mapping[int, Sample], device: torch.device) -> Tensor | None:
    """The inputs of the task's `respond` for samples."""
    if not task.reads_files:
        return None
    return task.encode(model, video_of(list(read.values()), model.config.vision.image_size).to(device))
