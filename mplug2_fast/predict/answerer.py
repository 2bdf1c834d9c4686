"""Answers to questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from torch import Tensor

from mplug2_fast.models.mplug2.config import Task
from mplug2_fast.predict.predictor import Alternative, Paths, Result, Texts, VideoTask, require
from mplug2_fast.text import clean_question, is_text

MAX_CANDIDATES = 128
"""As many candidates as the released code keeps after the first token, to score them in full."""

MAX_QUESTION_WORDS = 50
MAX_QUESTION_LENGTH = 10_000

Asker = Callable[[Tensor, Sequence[str]], list[Texts]]
"""From image_embeds `(B, S, D)` and a question for each to the answers to each."""


class Answerer(VideoTask):
    """Answers to a question about video and image files."""

    task: ClassVar[Task] = "question_answering"

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
        """One `Result` a file, each as soon as it is ready; in the order of the files, unless several processes decode.

        Args:
            paths: one file or several, each asked the same question.
            question: at most 50 words; it is cleaned up as the released datasets do.
            candidates: the answers to choose from; None writes an answer freely, by beam search.
            num_beams, min_length, max_length: of the beam search, as in `Captioner.caption`; not with candidates.
            num_return: how many answers a file, at most `num_beams`, or at most the number of candidates.
            num_workers, timeout: processes that decode, as in `Captioner.caption`.

        Raises:
            ConfigError: a question or candidates that the model cannot read, or options that contradict one another.
            MPlug2Error: the device ran out of memory.
        """
        self.check_question(question)
        ask = self.asker(candidates, num_beams, num_return, min_length, max_length)

        def words(image_embeds: Tensor) -> list[Texts]:
            return ask(image_embeds, [question] * len(image_embeds))

        return self.run(paths, words, num_workers, timeout)

    def asker(
        self,
        candidates: Sequence[str] | None = None,
        num_beams: int | None = None,
        num_return: int = 1,
        min_length: int | None = None,
        max_length: int | None = None,
    ) -> Asker:
        """What turns image_embeds and questions into answers, with the options of `answer`. Raises `ConfigError`."""
        if candidates is not None:
            searching = {"num_beams": num_beams, "min_length": min_length, "max_length": max_length}
            given = [name for name, value in searching.items() if value is not None]
            require(not given, f"{', '.join(given)}: of no use when the answer is chosen from candidates")
            return self._chooser(candidates, num_return)
        options = self.generation_options(num_beams, num_return, min_length, max_length)

        def ask(image_embeds: Tensor, questions: Sequence[str]) -> list[Texts]:
            ids, mask = (tensor.to(image_embeds.device) for tensor in self.tokenizer.encode_questions(questions))
            found = self.model.generate(image_embeds=image_embeds, question_ids=ids, question_mask=mask, **options)
            return self.texts(found)

        return ask

    def _chooser(self, candidates: Sequence[str], num_return: int) -> Asker:
        """What turns image_embeds and questions into the best of the candidates."""
        answers = self._candidates(candidates)
        count = len(candidates)
        require(1 <= num_return <= count, f"num_return must be from 1 to the {count} candidates, got {num_return}")
        k = min(count, max(MAX_CANDIDATES, num_return))

        def ask(image_embeds: Tensor, questions: Sequence[str]) -> list[Texts]:
            asked = self.tokenizer.encode_questions(questions)
            tensors = [tensor.to(image_embeds.device) for tensor in (*asked, *answers)]
            indices, probabilities = self.model.rank_answers(None, *tensors, k, image_embeds=image_embeds)
            finite = probabilities.isfinite().all(dim=1).tolist()
            best = zip(indices[:, :num_return].tolist(), probabilities[:, :num_return].tolist(), strict=True)
            return [
                [Alternative(candidates[i], p) for i, p in zip(*row, strict=True)] if fine else self.not_finite()
                for row, fine in zip(best, finite, strict=True)
            ]

        return ask

    def unknown_words(self, question: str) -> list[str]:
        """The words of a question that the model's vocabulary lacks: to the model they all look the same."""
        return self.tokenizer.unknown_words(clean_question(question))

    def check_question(self, question: str) -> None:
        """Raises `ConfigError` for a question that the model cannot read."""
        require(is_text(question), "the question has characters that are not UTF-8")
        words = len(question.split())
        require(bool(clean_question(question).strip()), "the question is empty")
        require(words <= MAX_QUESTION_WORDS, f"the question has {words} words, at most {MAX_QUESTION_WORDS} are read")
        require(len(question) <= MAX_QUESTION_LENGTH, f"the question is longer than {MAX_QUESTION_LENGTH:,} characters")
        ids, _ = self.tokenizer.encode_questions([question])
        self._require_positions("the question", ids)

    def _candidates(self, candidates: Sequence[str]) -> tuple[Tensor, Tensor]:
        require(not isinstance(candidates, str), "candidates must be a list of answers, not one text")
        require(len(candidates) > 0, "the list of candidates is empty")
        require(all(candidate.strip() for candidate in candidates), "a candidate is empty")
        require(all(is_text(candidate) for candidate in candidates), "a candidate has characters that are not UTF-8")
        ids, mask = self.tokenizer.encode_answers(candidates)
        self._require_positions("a candidate", ids)
        return ids, mask

    def _require_positions(self, what: str, ids: Tensor) -> None:
        positions = self.model.config.text.max_position_embeddings
        require(ids.shape[1] <= positions, f"{what} has {ids.shape[1]} tokens, and the model reads at most {positions}")
