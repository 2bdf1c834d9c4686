"""mPLUG-2 for captioning, question answering, retrieval and pre-training: the official computation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.models.mplug2.config import MPlug2Config
from mplug2_fast.models.mplug2.official_names import MPlug2Names
from mplug2_fast.models.names import DECODER, FUSION, TEXT
from mplug2_fast.modes import in_eval_mode
from mplug2_fast.outputs import GenerationOutput
from mplug2_fast.reference.decoder import (
    PredictionHead,
    TextDecoder,
    beam_search,
    rank_answers,
    shifted_labels,
    stacked,
)
from mplug2_fast.reference.encoders import TextEncoder, UnsharedLayers
from mplug2_fast.reference.fusion import FusionEncoder
from mplug2_fast.reference.retrieval import Retrieval
from mplug2_fast.reference.vision import LocalTemporal, VisionTransformer
from mplug2_fast.tasks import AnswerRanking, Captioning, QuestionAnswering, Task
from mplug2_fast.tasks import Retrieval as RetrievalTask


class _MPlug2(nn.Module):
    task_types: tuple[type[Task], ...]

    def __init__(
        self, config: MPlug2Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.tasks = {kind.name: kind() for kind in self.task_types}
        self._needed = config.modules_for([next(iter(self.tasks.values()))])
        text = config.text
        with torch.device(device or torch.get_default_device()):
            self.visual_encoder = nn.Module()
            self.visual_encoder.visual = VisionTransformer(config.vision)
            if config.vision.width != text.hidden_size:
                self.visn_fc = nn.Linear(config.vision.width, text.hidden_size)
                self.visn_layer_norm = nn.LayerNorm(text.hidden_size, eps=1e-12)
            self.visn_emb_norm = nn.LayerNorm(text.hidden_size, eps=1e-12)
            self.dropout = nn.Dropout(text.hidden_dropout_prob)
            self.text_encoder = TextEncoder(text, text=TEXT in self._needed)
            if text.num_uni_layer and not text.share_universal:
                self.universal_encoder = UnsharedLayers(text)
            if FUSION in self._needed:
                self.fusion_encoder = FusionEncoder(text)
            if DECODER in self._needed:
                self.text_decoder = TextDecoder(text)
            if isinstance(self, Retrieval):
                self.add_contrast(text.hidden_size, config.contrast.embed_dim)
                self.itm_head = nn.Linear(text.hidden_size, 2)
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=text.initializer_range)
        nn.init.normal_(self.visual_encoder.visual.class_embedding, std=text.initializer_range)
        for module in self.modules():
            if isinstance(module, LocalTemporal):
                nn.init.zeros_(module.up_proj.weight)
                nn.init.zeros_(module.up_proj.bias)
        self.to(dtype=dtype)

    @property
    def task(self) -> str:
        """The name of the first task."""
        return next(iter(self.tasks))

    @property
    def official_names(self) -> MPlug2Names:
        """The official name of every parameter."""
        return MPlug2Names(self.config, self._needed)

    def official_parameters(self) -> dict[str, Tensor]:
        """Official name -> this model's parameter, detached. The modules have the official names themselves."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def official_gradients(self) -> dict[str, Tensor | None]:
        """Official name -> gradient."""
        return {name: parameter.grad for name, parameter in self.named_parameters()}

    def encode_visual(self, video: Tensor) -> Tensor:
        """Video `(B, 3, T, H, W)` to the vision encoder's tokens `(B, S, D)`, brought to the BERT width."""
        x = self.visual_encoder.visual(video.to(self.visn_emb_norm.weight.dtype))
        if hasattr(self, "visn_fc"):
            x = self.dropout(self.visn_layer_norm(self.visn_fc(x)))
        return x

    def encode_video(self, video: Tensor) -> Tensor:
        """Video `(B, 3, T, H, W)`, normalised, to image_embeds `(B, S, D)`."""
        x = self.encode_visual(video)
        if self.config.text.num_uni_layer:
            layers = self.text_encoder if self.config.text.share_universal else self.universal_encoder
            x = x + layers.v_module(x)
        return self.dropout(self.visn_emb_norm(x))

    def fuse(self, text: Tensor, text_mask: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """(visual, text) of the fusion encoder."""
        visual_mask = torch.ones(visual.shape[:2], dtype=text_mask.dtype, device=visual.device)
        return self.fusion_encoder(text, text_mask, visual, visual_mask)

    def _beam_search(
        self,
        memory: Tensor,
        memory_mask: Tensor | None,
        num_beams: int | None,
        min_length: int | None,
        max_length: int | None,
        num_return: int,
    ) -> GenerationOutput:
        defaults = self.config.generation
        low, high = next(iter(self.tasks.values())).lengths
        low = low if defaults.min_length is None else defaults.min_length
        high = high if defaults.max_length is None else defaults.max_length
        beams = defaults.num_beams if num_beams is None else num_beams

        def next_logits(sequences: Tensor, alive: Tensor) -> Tensor:
            tiled = memory[alive].repeat_interleave(beams, dim=0)
            tiled_mask = None if memory_mask is None else memory_mask[alive].repeat_interleave(beams, dim=0)
            return self.text_decoder(sequences, torch.ones_like(sequences), tiled, tiled_mask)[:, -1]

        found = beam_search(
            next_logits,
            memory.shape[0],
            num_beams=beams,
            min_length=low if min_length is None else min_length,
            max_length=high if max_length is None else max_length,
            device=memory.device,
        )
        return stacked(found, num_return, memory.device)


class MPlug2ForCaptioning(_MPlug2):
    task_types = (Captioning,)

    def forward(self, video: Tensor, caption_ids: Tensor, caption_mask: Tensor) -> Tensor:
        """Training loss: the mean cross-entropy over the targets. All tokens of the prompt but the last are ignored.

        Args:
            video: `(B, 3, T, H, W)`. caption_ids, caption_mask: `(B, tokens)`.
        """
        logits = self.text_decoder(caption_ids, caption_mask, self.encode_video(video), None)
        labels = shifted_labels(caption_ids, self.config.generation.prompt_tokens)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())

    @torch.no_grad()
    @in_eval_mode
    def generate(
        self,
        video: Tensor,
        *,
        num_beams: int | None = None,
        min_length: int | None = None,
        max_length: int | None = None,
        num_return: int = 1,
    ) -> GenerationOutput:
        """Captions of videos `(B, 3, T, H, W)` by beam search."""
        return self._beam_search(self.encode_video(video), None, num_beams, min_length, max_length, num_return)


class MPlug2ForQuestionAnswering(_MPlug2):
    task_types = (QuestionAnswering, AnswerRanking)

    def encode_question(self, video: Tensor, question_ids: Tensor, question_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's memory `(B, S + tokens, D)`, [fusion visual; fusion text], and its padding mask."""
        text = self.text_encoder(question_ids, question_mask)
        visual, text = self.fuse(text, question_mask, self.encode_video(video))
        visual_mask = torch.ones(visual.shape[:2], dtype=question_mask.dtype, device=visual.device)
        return torch.cat([visual, text], dim=1), torch.cat([visual_mask, question_mask], dim=1)

    def forward(
        self,
        video: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answers_per_question: Tensor | Sequence[int],
        answer_weights: Tensor,
    ) -> Tensor:
        """Training loss: each answer's summed cross-entropy times its weight, summed, over the number of videos.

        Args:
            video: `(B, 3, T, H, W)`. question_ids, question_mask: `(B, tokens)`.
            answer_ids, answer_mask: `(A, tokens)`, the answers of all questions one after another.
            answers_per_question: `(B,)`, summing to A. answer_weights: `(A,)`.
        """
        memory, memory_mask = self.encode_question(video, question_ids, question_mask)
        counts = torch.as_tensor(answers_per_question, device=memory.device)
        memory = memory.repeat_interleave(counts, dim=0)
        memory_mask = memory_mask.repeat_interleave(counts, dim=0)
        logits = self.text_decoder(answer_ids, answer_mask, memory, memory_mask)
        labels = shifted_labels(answer_ids)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none").sum(dim=1)
        return (losses * answer_weights).sum() / video.shape[0]

    @torch.no_grad()
    @in_eval_mode
    def generate(
        self,
        video: Tensor,
        *,
        question_ids: Tensor,
        question_mask: Tensor,
        num_beams: int | None = None,
        min_length: int | None = None,
        max_length: int | None = None,
        num_return: int = 1,
    ) -> GenerationOutput:
        """Answers by beam search to one question a video; question_ids and question_mask are `(B, tokens)`."""
        memory, mask = self.encode_question(video, question_ids, question_mask)
        return self._beam_search(memory, mask, num_beams, min_length, max_length, num_return)

    @torch.no_grad()
    @in_eval_mode
    def rank_answers(
        self,
        video: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        k: int,
    ) -> tuple[Tensor, Tensor]:
        """The k likeliest of the given answers `(A, tokens)`: (indices, probabilities), each `(B, k)`, best first."""
        memory, mask = self.encode_question(video, question_ids, question_mask)
        return rank_answers(self.text_decoder, memory, mask, answer_ids, answer_mask, k)


class MPlug2ForRetrieval(Retrieval, _MPlug2):
    task_types = (RetrievalTask,)


class MPlug2ForPreTraining(MPlug2ForQuestionAnswering):
    """The question answering model with heads for masked words.

    The heads share the words of the text encoder, which is inferred: the official pre-training code is not public.
    """

    def __init__(
        self, config: MPlug2Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        for encoder in (self.text_encoder, self.fusion_encoder):
            encoder.cls = nn.Module()
            encoder.cls.predictions = PredictionHead(config.text).to(device=device, dtype=dtype)

    def masked_words(self, video: Tensor | None, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Logits `(B, tokens, vocabulary)` of the words of texts, after fusion if there is a video."""
        text, encoder = self.text_encoder(text_ids, text_mask), self.text_encoder
        if video is not None:
            text, encoder = self.fuse(text, text_mask, self.encode_video(video))[1], self.fusion_encoder
        return encoder.cls.predictions(text, self.text_encoder.embeddings.word_embeddings.weight)

    def masked_loss(self, video: Tensor | None, text_ids: Tensor, text_mask: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy where labels `(B, tokens)` are not -100."""
        return F.cross_entropy(self.masked_words(video, text_ids, text_mask).flatten(0, 1), labels.flatten())

    def prefix_loss(
        self, video: Tensor | None, prefix_ids: Tensor, prefix_mask: Tensor, rest_ids: Tensor, rest_mask: Tensor
    ) -> Tensor:
        """The mean cross-entropy of the rests of texts, with or without videos."""
        if video is None:
            memory, memory_mask = self.text_encoder(prefix_ids, prefix_mask), prefix_mask
        else:
            memory, memory_mask = self.encode_question(video, prefix_ids, prefix_mask)
        logits = self.text_decoder(rest_ids, rest_mask, memory, memory_mask)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), shifted_labels(rest_ids).flatten())

    @torch.no_grad()
    @in_eval_mode
    def generate_from_text(self, text_ids: Tensor, text_mask: Tensor, **options: int) -> GenerationOutput:
        """Texts for texts `(B, tokens)` by beam search. Options: num_beams, min_length, max_length and num_return."""
        return self._beam_search(self.text_encoder(text_ids, text_mask), text_mask, **options)
