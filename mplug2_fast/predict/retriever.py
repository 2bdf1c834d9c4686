"""Search: files and texts, ranked for each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mplug2_fast.predict.predictor import Decoded, PathLike, Predictor, Result
from mplug2_fast.tasks import Retrieval
from mplug2_fast.tasks.base import not_finite
from mplug2_fast.tasks.matching import LEFT_OUT

if TYPE_CHECKING:
    from mplug2_fast.tasks.gallery import Gallery

BATCH_SIZE = 8
"""Files per batch."""


class Match(NamedTuple):
    """A file or a text that was found, and its score."""

    name: str
    score: float


@dataclass(frozen=True)
class Ranking:
    """Files and texts, ranked for each other.

    Attributes:
        results: one per file, in order, with an `error` or without.
        texts: as given.
        by_file: scores `(files, texts)`; row i ranks the texts for file i. by_text: `(texts, files)`.
            Files with an error have no row and no column. Pairs that are not re-ranked have -100.
    """

    results: tuple[Result, ...]
    texts: tuple[str, ...]
    by_file: Tensor
    by_text: Tensor

    @property
    def paths(self) -> list[str]:
        """The files without an error, in the order of the rows."""
        return [result.path for result in self.results if result.error is None]

    def best_files(self, count: int) -> list[list[Match]]:
        """The best files for each text, at most `count`. Files that are not re-ranked are left out."""
        return _best(self.by_text, self.paths, count)

    def best_texts(self, count: int) -> list[list[Match]]:
        """The best texts for each of `paths`, at most `count`."""
        return _best(self.by_file, self.texts, count)


class Retriever(Predictor):
    """Searches image and video files with texts, and texts with files. Arguments: as for `Predictor`."""

    command = "retrieve"
    default_task = Retrieval.name

    def retrieve(
        self,
        paths: Sequence[PathLike],
        texts: Sequence[str],
        *,
        rerank: int = 0,
        num_frames: int | None = None,
        num_workers: int = 0,
        timeout: float | None = 60.0,
    ) -> Ranking:
        """Ranks files and texts for each other. Each file is encoded once.

        Args:
            paths, num_workers, timeout: as for `Predictor.predict`.
            texts: what the files are compared with.
            rerank: the number of candidates of each text and of each file, the most similar by their features. The
                matching head scores these pairs. This is slower, and keeps the visual tokens of all files in memory.
                0 ranks by features alone.
            num_frames: of a video; None is the model's number.

        Raises:
            ConfigError: bad options, no texts, no readable file, or too little memory for re-ranking.
            NotFiniteError, MPlug2Error: the model overflows, or the device ran out of memory.
        """
        self.check_texts(texts)
        gallery = self.gallery(len(paths), rerank=rerank)
        results = tuple(self.add(gallery, paths, num_frames=num_frames, num_workers=num_workers, timeout=timeout))
        return self.rank(gallery, results, texts)

    def check_texts(self, texts: Sequence[str]) -> None:
        """Raises `ConfigError` for a text that the model cannot read."""
        for text in texts:
            self.check_text(text)

    def gallery(self, files: int, **options: Any) -> Gallery:
        """An empty gallery for a number of files: see `Task.gallery`."""
        return self.task.gallery(self.model, self.tokenizer, files, **options)

    def add(
        self,
        gallery: Gallery,
        paths: Iterable[PathLike],
        *,
        num_frames: int | None = None,
        num_workers: int = 0,
        timeout: float | None = 60.0,
    ) -> Iterator[Result]:
        """Encodes files into a gallery. Yields a `Result` without a text for each, in order."""
        decoded = self.decoded(paths, num_workers, timeout, num_frames=num_frames, in_order=True)
        while batch := list(islice(decoded, BATCH_SIZE)):
            there = [each for each in batch if each.video is not None]
            finite, seconds = self._encode_into(gallery, [each.video for each in there if each.video is not None])
            added = iter(finite)
            for each in batch:
                error = each.error
                if error is None and not next(added):
                    error = str(not_finite(next(self.model.parameters()).dtype))
                yield _result(each, error, seconds)

    def rank(self, gallery: Gallery, results: Sequence[Result], texts: Sequence[str]) -> Ranking:
        """The scores of all files of a gallery with the texts."""
        try:
            scores = gallery.scores(texts)
        except (RuntimeError, MemoryError) as problem:
            self.explain_memory(problem)
            raise
        return Ranking(tuple(results), tuple(texts), scores.by_visual, scores.by_text)

    def _encode_into(self, gallery: Gallery, videos: list[Tensor]) -> tuple[list[bool], float]:
        """Which of the videos are finite, and the seconds per video."""
        if not videos:
            return [], 0.0
        try:
            image_embeds, seconds = self.encode(torch.cat(videos))
            return gallery.add(image_embeds), seconds / len(videos)
        except (RuntimeError, MemoryError) as problem:
            self.explain_memory(problem)
            raise


def _result(decoded: Decoded, error: str | None, encoding: float) -> Result:
    seconds = {"decode": decoded.seconds, **({} if decoded.video is None else {"encode": encoding})}
    return Result(
        decoded.path, frames=decoded.frames, decoder=decoded.decoder, seconds=seconds, error=error, size=decoded.size
    )


def _best(scores: Tensor, names: Sequence[str], count: int) -> list[list[Match]]:
    best = scores.topk(min(count, scores.shape[1]), dim=1)
    return [
        [Match(names[place], score) for place, score in zip(places, values, strict=True) if score > LEFT_OUT]
        for places, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
