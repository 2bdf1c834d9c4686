"""Answers to questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from torch import Tensor

from mplug2_fast.config import Task
from mplug2_fast.tasks.base import Alternative, Paths, Result, VideoTask, require
from mplug2_fast.text import clean_question

MAX_CANDIDATES = 128
"""As many candidates as the released code keeps after the first token, to score them in full."""

MAX_QUESTION_WORDS = 50


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
    ) -> Iterator[Result]:
        """One `Result` a file, in the order of the files, each as soon as it is ready.

        Args:
            paths: one file or several, each asked the same question.
            question: at most 50 words; it is cleaned up as the released datasets do.
            candidates: the answers to choose from; None writes an answer freely, by beam search.
            num_beams, min_length, max_length: of the beam search, as in `Captioner.caption`; not with candidates.
            num_return: how many answers a file, at most `num_beams`, or at most the number of candidates.

        Raises:
            ConfigError: a question or candidates that the model cannot read, or options that contradict one another.
            MPlug2Error: the device ran out of memory.
        """
        asked = self._question(question)
        if candidates is not None:
            searching = {"num_beams": num_beams, "min_length": min_length, "max_length": max_length}
            given = [name for name, value in searching.items() if value is not None]
            require(not given, f"{', '.join(given)}: of no use when the answer is chosen from candidates")
            return self.run(paths, self._chooser(asked, candidates, num_return))
        options = self.generation_options(num_beams, num_return, min_length, max_length)

        def words(image_embeds: Tensor) -> list[Alternative]:
            ids, mask = (tensor.to(image_embeds.device) for tensor in asked)
            found = self.model.generate(image_embeds=image_embeds, question_ids=ids, question_mask=mask, **options)
            return self.texts(found)

        return self.run(paths, words)

    def _chooser(
        self, asked: tuple[Tensor, Tensor], candidates: Sequence[str], num_return: int
    ) -> Callable[[Tensor], list[Alternative]]:
        """What turns image_embeds into the best of the candidates."""
        inputs = [*asked, *self._candidates(candidates)]
        count = len(candidates)
        require(1 <= num_return <= count, f"num_return must be from 1 to the {count} candidates, got {num_return}")
        k = min(count, max(MAX_CANDIDATES, num_return))

        def words(image_embeds: Tensor) -> list[Alternative]:
            tensors = [tensor.to(image_embeds.device) for tensor in inputs]
            indices, probabilities = self.model.rank_answers(None, *tensors, k, image_embeds=image_embeds)
            best = zip(indices[0].tolist(), probabilities[0].tolist(), strict=True)
            return [Alternative(candidates[i], probability) for i, probability in best][:num_return]

        return words

    def unknown_words(self, question: str) -> list[str]:
        """The words of a question that the model's vocabulary lacks: to the model they all look the same."""
        return self.tokenizer.unknown_words(clean_question(question))

    def _question(self, question: str) -> tuple[Tensor, Tensor]:
        words = len(question.split())
        require(bool(clean_question(question).strip()), "the question is empty")
        require(words <= MAX_QUESTION_WORDS, f"the question has {words} words, at most {MAX_QUESTION_WORDS} are read")
        ids, mask = self.tokenizer.encode_questions([question])
        self._require_positions("the question", ids)
        return ids, mask

    def _candidates(self, candidates: Sequence[str]) -> tuple[Tensor, Tensor]:
        require(not isinstance(candidates, str), "candidates must be a list of answers, not one text")
        require(len(candidates) > 0, "the list of candidates is empty")
        require(all(candidate.strip() for candidate in candidates), "a candidate is empty")
        ids, mask = self.tokenizer.encode_answers(candidates)
        self._require_positions("a candidate", ids)
        return ids, mask

    def _require_positions(self, what: str, ids: Tensor) -> None:
        positions = self.model.config.text.max_position_embeddings
        require(ids.shape[1] <= positions, f"{what} has {ids.shape[1]} tokens, and the model reads at most {positions}")
