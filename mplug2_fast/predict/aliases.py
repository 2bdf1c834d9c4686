"""`Predictor` for the tasks of the official checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mplug2_fast.predict.predictor import Paths, Predictor, Result
from mplug2_fast.tasks import AnswerRanking, Captioning, Grounding, QuestionAnswering
from mplug2_fast.tasks.base import require


class Captioner(Predictor):
    """Captions of video and image files. Arguments: as for `Predictor`."""

    command = "caption"
    default_task = Captioning.name

    def caption(
        self,
        paths: Paths,
        *,
        num_beams: int | None = None,
        num_return: int = 1,
        min_length: int | None = None,
        max_length: int | None = None,
        num_workers: int = 0,
        timeout: float | None = 60.0,
    ) -> Iterator[Result]:
        """One `Result` per file: see `Predictor.predict`.

        Args:
            paths, num_workers, timeout: as for `Predictor.predict`.
            num_beams: beams of the search; None is the model's default, as for the lengths.
            num_return: captions per file, at most `num_beams`.
            min_length, max_length: of the caption, in tokens, the end token included and [CLS] not.
        """
        options = {"num_beams": num_beams, "num_return": num_return, "min_length": min_length, "max_length": max_length}
        return self.predict(paths, num_workers=num_workers, timeout=timeout, **options)


class Answerer(Predictor):
    """Answers to a question about video and image files. Arguments: as for `Predictor`."""

    command = "answer"
    default_task = QuestionAnswering.name

    def answer(
        self,
        paths: Paths,
        question: str,
        candidates: Sequence[str] | None = None,
        *,
        num_beams: int | None = None,
        num_return: int = 1,
        min_length: int | None = None,
        max_length: int | None = None,
        num_workers: int = 0,
        timeout: float | None = 60.0,
    ) -> Iterator[Result]:
        """One `Result` per file: see `Predictor.predict`.

        Args:
            paths, num_workers, timeout: as for `Predictor.predict`.
            question: asked about each file; it is cleaned up as the official datasets of the model's family do. mPLUG-2
                reads at most 50 words.
            candidates: the answers to choose from; None generates an answer by beam search.
            num_beams, min_length, max_length: of the beam search, as in `Captioner.caption`; not with candidates.
            num_return: answers per file, at most `num_beams`, or at most the number of candidates.
        """
        self.check_text(question)
        predictor, options = self.with_options(candidates, num_beams, num_return, min_length, max_length)
        return predictor.predict(paths, question, num_workers=num_workers, timeout=timeout, **options)

    def with_options(
        self,
        candidates: Sequence[str] | None = None,
        num_beams: int | None = None,
        num_return: int = 1,
        min_length: int | None = None,
        max_length: int | None = None,
    ) -> tuple[Predictor, dict[str, Any]]:
        """The predictor, which generates or ranks, and its options. Raises `ConfigError` for options of the other."""
        searching = {"num_beams": num_beams, "min_length": min_length, "max_length": max_length}
        if candidates is None:
            return self, {"num_return": num_return, **searching}
        given = [name for name, value in searching.items() if value is not None]
        require(not given, f"{', '.join(given)}: not used when the answer is chosen from candidates")
        return self.for_task(AnswerRanking.name), {"candidates": candidates, "num_return": num_return}


class Grounder(Predictor):
    """Boxes of what a phrase names in image files. Arguments: as for `Predictor`."""

    command = "ground"
    default_task = Grounding.name

    def ground(
        self, paths: Paths, phrase: str, *, num_workers: int = 0, timeout: float | None = 60.0
    ) -> Iterator[Result]:
        """One `Result` per file, whose `box` is (left, top, right, bottom) in pixels: see `Predictor.predict`.

        Args:
            paths, num_workers, timeout: as for `Predictor.predict`.
            phrase: names one thing in each image, such as "the red circle".
        """
        return self.predict(paths, phrase, num_workers=num_workers, timeout=timeout)
