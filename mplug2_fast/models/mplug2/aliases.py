"""`MPlug2` for the tasks of the official checkpoints, with a `forward` and a `generate` of one task each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mplug2_fast.models.mplug2.config import MPlug2Config
from mplug2_fast.models.mplug2.model import MPlug2
from mplug2_fast.outputs import GenerationOutput
from mplug2_fast.tasks import AnswerRanking, Captioning, QuestionAnswering


class MPlug2ForCaptioning(MPlug2):
    """Video to caption: vision encoder, universal layers and decoder."""

    def __init__(
        self, config: MPlug2Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config, [Captioning.name], device=device, dtype=dtype)

    def forward(
        self, video: Tensor | None, caption_ids: Tensor, caption_mask: Tensor, *, image_embeds: Tensor | None = None
    ) -> Tensor:
        """Training loss: see `Captioning.loss`."""
        batch = {"caption_ids": caption_ids, "caption_mask": caption_mask}
        return self.loss(Captioning.name, {"video": video, "image_embeds": image_embeds, **batch})

    def generate(  # type: ignore[override]
        self,
        video: Tensor | None = None,
        *,
        image_embeds: Tensor | None = None,
        num_beams: int | None = None,
        min_length: int | None = None,
        max_length: int | None = None,
        num_return: int = 1,
    ) -> GenerationOutput:
        """Captions by beam search: see `Captioning.predict`."""
        options = {"num_beams": num_beams, "min_length": min_length, "max_length": max_length, "num_return": num_return}
        return self.predict(Captioning.name, video, image_embeds, **options)


class MPlug2ForQuestionAnswering(MPlug2):
    """Video and question to answer: the captioning model, text encoder and fusion encoder."""

    def __init__(
        self, config: MPlug2Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config, [QuestionAnswering.name, AnswerRanking.name], device=device, dtype=dtype)

    def captioner(self) -> MPlug2ForCaptioning:
        """A captioning model that shares this model's parameters."""
        model = MPlug2ForCaptioning(self.config, device="meta")
        for name in model._modules:
            setattr(model, name, getattr(self, name))
        model.quantisation = self.quantisation
        return model.train(self.training)

    def forward(
        self,
        video: Tensor | None,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answers_per_question: Tensor | Sequence[int],
        answer_weights: Tensor,
        *,
        image_embeds: Tensor | None = None,
    ) -> Tensor:
        """Training loss: see `QuestionAnswering.loss`."""
        batch = {
            "video": video,
            "image_embeds": image_embeds,
            "question_ids": question_ids,
            "question_mask": question_mask,
            "answer_ids": answer_ids,
            "answer_mask": answer_mask,
            "answers_per_question": answers_per_question,
            "answer_weights": answer_weights,
        }
        return self.loss(QuestionAnswering.name, batch)

    def generate(  # type: ignore[override]
        self,
        video: Tensor | None = None,
        *,
        question_ids: Tensor,
        question_mask: Tensor,
        image_embeds: Tensor | None = None,
        num_beams: int | None = None,
        min_length: int | None = None,
        max_length: int | None = None,
        num_return: int = 1,
    ) -> GenerationOutput:
        """Answers by beam search: see `QuestionAnswering.predict`."""
        questions = {"question_ids": question_ids, "question_mask": question_mask, "image_embeds": image_embeds}
        options = {"num_beams": num_beams, "min_length": min_length, "max_length": max_length, "num_return": num_return}
        return self.predict(QuestionAnswering.name, video, **questions, **options)

    def rank_answers(
        self,
        video: Tensor | None,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        k: int,
        *,
        image_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k most likely of the given answers: see `AnswerRanking.predict`."""
        questions = {"question_ids": question_ids, "question_mask": question_mask, "image_embeds": image_embeds}
        return self.predict(AnswerRanking.name, video, **questions, answer_ids=answer_ids, answer_mask=answer_mask, k=k)
