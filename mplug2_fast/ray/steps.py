"""Steps for Ray Data: they caption the videos that a column names, answer questions about them, or do any other task.

    import ray
    from mplug2_fast.ray import Captions

    videos = ray.data.from_items([{"path": path} for path in paths])
    captions = videos.map_batches(
        Captions,
        fn_constructor_kwargs={"checkpoint": "mplug2_msrvtt_caption.pth"},
        batch_size=32,
        concurrency=8,
        num_gpus=1,
    )
    captions.write_parquet("captions")

A step works like a bulk run: worker processes decode, and the model computes batches. A file that is broken or times
out gets an `error` and affects no other. This module does not import Ray.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mplug2_fast.bulk.batches import batches_of_videos
from mplug2_fast.bulk.journal import Line
from mplug2_fast.bulk.runs import Decoding, decoder_for, retries, steps
from mplug2_fast.bulk.sources import Question, Source
from mplug2_fast.bulk.work import Frames, Predict, Work
from mplug2_fast.errors import ConfigError
from mplug2_fast.predict import Answerer, Captioner, Predictor

Columns = dict[str, Any]

_USUAL = {"num_beams": None, "num_return": 1, "min_length": None, "max_length": None}


class _Step:
    """Adds columns with the results to a batch of columns."""

    def __init__(self, work: Work[Any], num_workers: int, timeout: float | None) -> None:
        self._work = work
        self._decoding = Decoding(num_workers, timeout)
        self._pool = decoder_for(work, self._decoding)
        self._decoder = self._pool.__enter__()

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            self._pool.__exit__(None, None, None)

    def _lines(self, videos: Sequence[Source]) -> list[Line]:
        """The line of each video."""
        clips = self._decoder.clips(video.path for video in videos)
        found: dict[int, list[Line]] = {}
        again: list[int] = []
        for step in steps(self._work, videos, batches_of_videos(clips, [range(len(videos))]), again):
            found |= step.lines
        for step in retries(self._work, videos, again, self._decoding):
            found |= step.lines
        return [found[number][0] for number in range(len(videos))]


class Captions(_Step):
    """Adds `text`, `score`, `decoder`, `error`, and as JSON `alternatives`, `frames` and `seconds`.

    Args:
        checkpoint, dtype, device, keep: as for `Captioner`. num_frames: frames per clip, by default the model's.
        num_workers, timeout: decoding processes, and their timeout per file in seconds.
        options: of `Captioner.caption`.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        dtype: str | None = None,
        device: str | None = None,
        keep: Sequence[str] = (),
        num_frames: int | None = None,
        num_workers: int = 1,
        timeout: float | None = 60.0,
        **options: int,
    ) -> None:
        captioner = Captioner(checkpoint, dtype=dtype, device=device, keep=keep)
        super().__init__(Predict(captioner, _frames(captioner, num_frames), _searching(options)), num_workers, timeout)

    def __call__(self, batch: Columns) -> Columns:
        """Takes a batch with a column `path`."""
        return batch | _columns(self._lines([Source(str(path)) for path in batch["path"]]))


class Answers(_Step):
    """Like `Captions`, for a column `question`, or for one question about all videos.

    Args:
        question: asked about each video. None: use the column. candidates: answers to choose from, or None.
        options: of `Answerer.answer`.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        question: str | None = None,
        candidates: Sequence[str] | None = None,
        dtype: str | None = None,
        device: str | None = None,
        keep: Sequence[str] = (),
        num_frames: int | None = None,
        num_workers: int = 1,
        timeout: float | None = 60.0,
        **options: int,
    ) -> None:
        answerer = Answerer(checkpoint, dtype=dtype, device=device, keep=keep)
        predictor, filled = answerer.with_options(candidates, **_searching(options))
        self._question = question
        super().__init__(Predict(predictor, _frames(predictor, num_frames), filled), num_workers, timeout)

    def __call__(self, batch: Columns) -> Columns:
        """Takes a batch with a column `path`, and a column `question` unless one question is set."""
        questions = batch["question"] if self._question is None else [self._question] * len(batch["path"])
        for question in dict.fromkeys(questions):
            self._work.predictor.check_text(question)
        asked = zip(batch["path"], questions, strict=True)
        videos = [Source(str(path), (Question(str(question)),)) for path, question in asked]
        return batch | _columns(self._lines(videos))


class Results(_Step):
    """Like `Captions`, for any task. A column `text` of the batch has what goes with each file; its place is taken by
    the results.

    Args:
        predictor: a kind of `Predictor`, such as `Classifier`. arguments: of the predictor, such as task.
        text: for all files. None: use the column, if the task reads texts.
        options: of the task.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        predictor: type[Predictor] = Predictor,
        arguments: Mapping[str, Any] | None = None,
        text: str | None = None,
        num_frames: int | None = None,
        num_workers: int = 1,
        timeout: float | None = 60.0,
        **options: Any,
    ) -> None:
        loaded = predictor(checkpoint, **(arguments or {}))
        self._text = text
        super().__init__(Predict(loaded, _frames(loaded, num_frames), options), num_workers, timeout)

    def __call__(self, batch: Columns) -> Columns:
        """Takes a batch with a column `path`, unless the task is on texts alone, and a column `text` where the task
        reads texts and no text is set."""
        task = self._work.predictor.task
        paths = [str(path) for path in batch["path"]] if task.reads_files else [""] * len(batch["text"])
        if not task.reads_text:
            return batch | _columns(self._lines([Source(path) for path in paths]))
        texts = [str(text) for text in batch["text"]] if self._text is None else [self._text] * len(paths)
        for text in dict.fromkeys(texts):
            self._work.predictor.check_text(text)
        videos = [Source(path, (Question(text),)) for path, text in zip(paths, texts, strict=True)]
        return batch | _columns(self._lines(videos))


def _frames(predictor: Predictor, num_frames: int | None) -> Frames:
    return Frames(num_frames or predictor.task.num_frames(predictor.model.config))


def _searching(options: dict[str, Any]) -> dict[str, Any]:
    """Adds defaults for missing options."""
    if unknown := options.keys() - _USUAL:
        raise ConfigError(f"{', '.join(sorted(unknown))}: unknown option; use {', '.join(_USUAL)}")
    return _USUAL | options


def _columns(lines: Sequence[Line]) -> Columns:
    """Missing texts are None, missing numbers NaN. Lists and dictionaries become JSON."""
    scores = [math.nan if line["score"] is None else line["score"] for line in lines]
    return {
        "text": np.array([line["text"] for line in lines], dtype=object),
        "score": np.array(scores, dtype=np.float64),
        **{
            name: np.array([json.dumps(line[name]) for line in lines], dtype=object)
            for name in ("alternatives", "frames", "seconds")
        },
        **{name: np.array([line[name] for line in lines], dtype=object) for name in ("decoder", "error")},
    }
