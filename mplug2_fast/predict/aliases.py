"""`Predictor` for the tasks of the official checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mplug2_fast.errors import CheckpointError, NotFiniteError
from mplug2_fast.images.views import Views
from mplug2_fast.predict.predictor import Decoded, PathLike, Paths, Predictor, Result
from mplug2_fast.tasks import (
    AnswerRanking,
    Captioning,
    Classification,
    Grounding,
    QuestionAnswering,
    Respond,
    Retrieval,
    Task,
    TextGeneration,
    ZeroShot,
)
from mplug2_fast.tasks.base import require
from mplug2_fast.text import Tokenizer

if TYPE_CHECKING:
    from mplug2_fast.video import Preparation


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
            num_beams: beams of the search. None, here and for the lengths, is the model's default.
            num_return: captions per file, at most `num_beams`.
            min_length, max_length: of the caption in tokens, with the end token and without [CLS].
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
            question: for each file. It is cleaned like those of the official datasets. mPLUG-2 reads at most 50 words.
            candidates: the answers to choose from; None generates an answer by beam search.
            num_beams, min_length, max_length: of the beam search, as in `Captioner.caption`. Not with candidates.
            num_return: answers per file, at most `num_beams`, or at most the number of candidates.
        """
        self.check_text(question)
        predictor, options = self.with_options(candidates, num_beams, num_return, min_length, max_length)
        return predictor.predict(paths, question, num_workers=num_workers, timeout=timeout, **options)

    def with_options(  # type: ignore[override]
        self,
        candidates: Sequence[str] | None = None,
        num_beams: int | None = None,
        num_return: int = 1,
        min_length: int | None = None,
        max_length: int | None = None,
    ) -> tuple[Predictor, dict[str, Any]]:
        """The predictor that generates or ranks, and its options. Raises `ConfigError` for options of the other one."""
        searching = {"num_beams": num_beams, "min_length": min_length, "max_length": max_length}
        if candidates is None:
            return self, {"num_return": num_return, **searching}
        given = [name for name, value in searching.items() if value is not None]
        require(not given, f"{', '.join(given)}: not used when the answer is chosen from candidates")
        return self.for_task(AnswerRanking.name), {"candidates": candidates, "num_return": num_return}


class Grounder(Predictor):
    """Boxes of the object that a phrase names in image files. Arguments: as for `Predictor`."""

    command = "ground"
    default_task = Grounding.name

    def ground(
        self, paths: Paths, phrase: str, *, num_workers: int = 0, timeout: float | None = 60.0
    ) -> Iterator[Result]:
        """One `Result` per file, whose `box` is (left, top, right, bottom) in pixels: see `Predictor.predict`.

        Args:
            paths, num_workers, timeout: as for `Predictor.predict`.
            phrase: names one object in each image, such as "the red circle".
        """
        return self.predict(paths, phrase, num_workers=num_workers, timeout=timeout)


class Matcher(Predictor):
    """The probability that a text matches a file, from the matching head. Arguments: as for `Predictor`."""

    command = "match"
    default_task = Retrieval.name

    def match(self, paths: Paths, text: str, *, num_workers: int = 0, timeout: float | None = 60.0) -> Iterator[Result]:
        """One `Result` per file, whose `score` is the probability that the text matches it.

        Args:
            paths, num_workers, timeout: as for `Predictor.predict`.
            text: such as "a red circle moves left".
        """
        return self.predict(paths, text, num_workers=num_workers, timeout=timeout)


class Classifier(Predictor):
    """Classes of image and video files, of texts, or of both together.

    Args:
        checkpoint, tokenizer, dtype, device, keep: as for `Predictor`.
        task: a `Classification`, its name in the checkpoint, or a `ZeroShot`; None is the first classification of the
            checkpoint.
        clips, crops: views of a video, whose probabilities are averaged. The clips spread over the video at other
            times, the crops over the long side of the frames.

    Raises:
        CheckpointError, ConfigError: as for `Predictor`, or the checkpoint has no classification.
    """

    command = "classify"

    def __init__(
        self,
        checkpoint: PathLike | torch.nn.Module | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        task: Task | str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        keep: Sequence[str] = (),
        clips: int = 1,
        crops: int = 1,
    ) -> None:
        require(min(clips, crops) >= 1, f"clips and crops must be at least 1, got {clips} and {crops}")
        super().__init__(checkpoint, tokenizer, task=task, dtype=dtype, device=device, keep=keep)
        if task is None:
            found = (each for each in self.model.tasks.values() if isinstance(each, Classification))
            self.task = next(found, self.task)
        if not isinstance(self.task, (Classification, ZeroShot)):
            name = "the included tiny model" if checkpoint is None else "the checkpoint"
            known = ", ".join(self.model.tasks)
            raise CheckpointError(
                f"{name} has no classification, only {known}: use a checkpoint that was trained for one"
            )
        one = clips * crops == 1
        require(one or self.task.reads_files, f"{self.task.name} takes texts alone, which have no clips or crops")
        self._views = clips, crops

    @property
    def preparation(self) -> Preparation:
        clips, crops = self._views
        return super().preparation if clips * crops == 1 else Views(super().preparation, clips, crops)

    def classify(
        self,
        paths: Paths,
        text: str | None = None,
        *,
        num_return: int = 1,
        num_workers: int = 0,
        timeout: float | None = 60.0,
    ) -> Iterator[Result]:
        """One `Result` per file: see `Predictor.predict`. For texts alone, see `predict_texts`.

        Args:
            paths, num_workers, timeout: as for `Predictor.predict`.
            text: the text for each file, for classes of both together.
            num_return: labels per file, the likeliest first.
        """
        return self.predict(paths, text, num_return=num_return, num_workers=num_workers, timeout=timeout)

    def classify_pairs(
        self,
        pairs: Iterable[tuple[PathLike, PathLike]],
        text: str,
        *,
        num_return: int = 1,
        num_workers: int = 0,
        timeout: float | None = 60.0,
    ) -> Iterator[Result]:
        """One `Result` per pair of images, for a classification on two images. Its `path` has both.

        Args:
            pairs: image files. text: the text for each pair.
            num_return, num_workers, timeout: as for `classify`.
        """
        two = isinstance(self.task, Classification) and self.task.on == "two_images"
        require(two, f"{self.task.name} is not a classification on two images: use classify")
        self.check_text(text)
        respond = self.responder(num_return=num_return)
        files = [path for pair in pairs for path in pair]
        decoded = self.decoded(files, num_workers, timeout, num_frames=1, in_order=True)
        return (self._of_pair(respond, text, first, second) for first, second in zip(decoded, decoded, strict=True))

    def _of_pair(self, respond: Respond, text: str, first: Decoded, second: Decoded) -> Result:
        both, seconds = f"{first.path} and {second.path}", {"decode": first.seconds + second.seconds}
        for each in (first, second):
            if each.error is not None:
                return Result(both, seconds=seconds, error=f"{each.path}: {each.error}")
        assert first.video is not None
        assert second.video is not None
        embeds, seconds["encode"] = self.encode(torch.stack([first.video, second.video], dim=1))
        (found,), seconds["generate"] = self.say(embeds, lambda tokens: respond(tokens, [text]))
        if isinstance(found, NotFiniteError):
            return Result(both, seconds=seconds, error=str(found))
        return Result(both, *found[0], tuple(found), seconds=seconds)


class TextGenerator(Predictor):
    """Texts from texts. Arguments: as for `Predictor`. Results come from `predict_texts`, with options of beam search:
    num_beams, num_return, min_length and max_length."""

    command = "generate-text"
    default_task = TextGeneration.name
