"""Evaluation by a gallery: all files and all captions of a data set, ranked for each other."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mplug2_fast import bulk
from mplug2_fast.bulk.sources import path_of_files
from mplug2_fast.bulk.work import model_settings
from mplug2_fast.datasets import Item
from mplug2_fast.errors import ConfigError, DataError, printable
from mplug2_fast.evaluation.recall import ranks_of, recalls_of_ranks
from mplug2_fast.evaluation.report import ItemResult
from mplug2_fast.evaluation.scoring import Scored
from mplug2_fast.predict import Predictor, Ranking, Retriever

ALTERNATIVES = 4
"""Texts after the best one in the result of an item."""


@dataclass(frozen=True)
class Pairs:
    """The files of items, each once, and all captions, each with the number of its file."""

    files: list[str]
    texts: list[str]
    owners: list[int]

    @classmethod
    def of(cls, items: Sequence[Item]) -> Pairs:
        files: dict[str, int] = {}
        texts: list[str] = []
        owners: list[int] = []
        for item in items:
            number = files.setdefault(path_of(item), len(files))
            texts += item.caption
            owners += [number] * len(item.caption)
        return cls(list(files), texts, owners)


@dataclass(frozen=True)
class PairRanks:
    """The rank, from 1, of the best caption for each file, and of the file for each caption.

    Ranks are infinite where the file cannot be read.
    """

    files: list[float]
    texts: list[float]

    @classmethod
    def of(cls, pairs: Pairs, read: Sequence[int], by_file: Tensor, by_text: Tensor) -> PairRanks:
        """The ranks from scores `(files, texts)` and `(texts, files)`. `read` are the numbers of their files."""
        rows = {number: row for row, number in enumerate(read)}
        owners = torch.tensor([rows.get(owner, -1) for owner in pairs.owners])
        right = owners == torch.arange(len(read))[:, None]
        files, texts = [math.inf] * len(pairs.files), [math.inf] * len(pairs.texts)
        if len(read):
            for number, rank in zip(read, ranks_of(by_file, right), strict=True):
                files[number] = rank
            there = (owners >= 0).nonzero()[:, 0]
            for number, rank in zip(there.tolist(), ranks_of(by_text[there], right.T[there]), strict=True):
                texts[number] = rank
        return cls(files, texts)

    def metrics(self) -> dict[str, float]:
        """Recall in both directions: `text_*` for files that find texts, `visual_*` for texts that find files."""
        ways = {"text": recalls_of_ranks(self.files), "visual": recalls_of_ranks(self.texts)}
        mean = sum(found["recall_mean"] for found in ways.values()) / len(ways)
        return {
            **{f"{way}_{name}": value for way, found in ways.items() for name, value in found.items()},
            "recall_mean": mean,
        }


@dataclass(frozen=True)
class Evaluated:
    """An evaluation: its metrics, the results of all items, and the settings that decide them."""

    scored: Scored
    items: list[ItemResult]
    settings: dict[str, Any]


def evaluate_gallery(
    predictor: Predictor,
    items: Sequence[Item],
    options: Mapping[str, Any],
    frames: bulk.Frames,
    decoding: bulk.Decoding,
    started: Callable[[bulk.Plan], Callable[[int, int], None]] | None = None,
) -> Evaluated:
    """Rank all files and all captions of the items for each other. Arguments: as for `evaluate`.

    Raises:
        DataError: the model cannot read a caption. ConfigError, MPlug2Error: as in `Retriever.retrieve`.
    """
    retriever = Retriever(predictor.model, predictor.tokenizer, task=predictor.task)
    pairs = Pairs.of(items)
    for item in items:
        try:
            retriever.check_texts(item.caption)
        except ConfigError as error:
            raise DataError(f"the item {printable(item.id)}: {error}") from error
    gallery = retriever.gallery(len(pairs.files), **options)
    progress = started(bulk.Plan([], 1, len(pairs.files), 0)) if started is not None else None
    results = []
    decode = {"num_frames": frames.count, "num_workers": decoding.num_workers, "timeout": decoding.timeout}
    for result in retriever.add(gallery, pairs.files, **decode):
        results.append(result)
        if progress is not None:
            progress(1, result.error is not None)
    read = [number for number, result in enumerate(results) if result.error is None]
    if read:
        ranking = retriever.rank(gallery, results, pairs.texts)
    else:
        ranking = Ranking(tuple(results), tuple(pairs.texts), torch.zeros(0, 0), torch.zeros(0, 0))
    ranks = PairRanks.of(pairs, read, ranking.by_file, ranking.by_text)
    settings = {name: value for name, value in model_settings(predictor, frames).items() if name != "windows"}
    scored = Scored(ranks.metrics(), libraries=dict.fromkeys(predictor.task.metrics, "mplug2_fast"))
    return Evaluated(scored, _results(items, pairs, ranking, ranks), settings | dict(options))


def _results(items: Sequence[Item], pairs: Pairs, ranking: Ranking, ranks: PairRanks) -> list[ItemResult]:
    best = dict(zip(ranking.paths, ranking.best_texts(1 + ALTERNATIVES), strict=True)) if ranking.paths else {}
    numbers = {path: number for number, path in enumerate(pairs.files)}
    found, start = [], 0
    for item in items:
        number = numbers[path_of(item)]
        texts = ranks.texts[start : start + len(item.caption)]
        start += len(item.caption)
        result = ranking.results[number]
        matches = [match.name for match in best.get(result.path, ())]
        found.append(
            ItemResult(
                id=item.id,
                path=result.path,
                prediction=matches[0] if matches else None,
                alternatives=tuple(matches[1:]),
                references=dict.fromkeys(item.caption, 1.0),
                scores={
                    "text_reciprocal_rank": 100 / ranks.files[number],
                    "visual_reciprocal_rank": statistics.mean(100 / rank for rank in texts),
                    "text_rank": ranks.files[number],
                    "visual_rank": statistics.median(texts),
                },
                frames=result.frames,
                error=result.error,
            )
        )
    return found


def path_of(item: Item) -> str:
    """The file of an item, or both of its files; empty for an item without any."""
    return path_of_files(files_of(item))


def files_of(item: Item) -> tuple[str, ...]:
    """The video or image of an item, or its images; none for a text alone."""
    file = item.video or item.image
    return tuple(os.fspath(Path(each)) for each in (item.images if file is None else (file,)))
