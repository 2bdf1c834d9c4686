"""mPLUG: the official computation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.models.mplug.config import MPlugConfig
from mplug2_fast.models.mplug.official_names import MPlugNames
from mplug2_fast.models.names import CONTRAST, DECODER, FUSION, MATCHING, TEXT, VISION
from mplug2_fast.modes import in_eval_mode
from mplug2_fast.outputs import GenerationOutput
from mplug2_fast.reference.bert import BertEmbeddings, BertEncoder, BertLayer, self_attention_mask
from mplug2_fast.reference.decoder import TextDecoder, beam_search, rank_answers, shifted_labels, stacked
from mplug2_fast.reference.fusion import FusionEncoder
from mplug2_fast.reference.retrieval import Retrieval
from mplug2_fast.reference.vision import ImageTransformer
from mplug2_fast.tasks import Task, get

START, FIRST_BIN, BINS = 344, 345, 337
"""Tokens of boxes: the start, the first place, and how many places there are."""


class TextEncoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(
            {i: BertLayer(config, cross_attention=False) for i in range(config.text_encoder_layers)}
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        mask = self_attention_mask(attention_mask, x.dtype)
        for layer in self.encoder.layer.values():
            x = layer(x, mask)
        return x


class MPlug(Retrieval, nn.Module):
    """The modules under their official names, and each task as the official code computes it."""

    def __init__(
        self,
        config: MPlugConfig,
        tasks: Sequence[Task | str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tasks = {task.name: task for task in map(get, tasks)}
        self._needed = config.modules_for(self.tasks.values())
        text, width = config.text, config.text.hidden_size
        with torch.device(device or torch.get_default_device()):
            self.dropout = nn.Dropout(text.hidden_dropout_prob)
            if VISION in self._needed:
                self.visual_encoder = nn.Module()
                self.visual_encoder.visual = ImageTransformer(config.vision, config.vision.attention_dropout)
                if config.vision.width != width:
                    self.visn_fc = nn.Linear(config.vision.width, width)
                    self.visn_layer_norm = nn.LayerNorm(width, eps=1e-12)
            if TEXT in self._needed:
                self.text_encoder = TextEncoder(text)
            if FUSION in self._needed:
                self.fusion_encoder = FusionEncoder(text)
            if DECODER in self._needed:
                self.text_decoder = TextDecoder(text)
            if CONTRAST in self._needed:
                self.add_contrast(width, config.contrast.embed_dim)
            if MATCHING in self._needed:
                self.itm_head = nn.Linear(width, 2)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 or name.endswith("class_embedding"):
                nn.init.normal_(parameter, std=text.initializer_range)
        self.to(dtype=dtype)

    @property
    def official_names(self) -> MPlugNames:
        """The official name of every parameter."""
        return MPlugNames(self.config, self._needed)

    def official_parameters(self) -> dict[str, Tensor]:
        """Official name -> this model's parameter, detached. The modules have the official names themselves."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def official_gradients(self) -> dict[str, Tensor | None]:
        """Official name -> gradient."""
        return {name: parameter.grad for name, parameter in self.named_parameters()}

    # --- parts

    def encode_image(self, image: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` to image_embeds `(B, S, D)`."""
        x = self.visual_encoder.visual(image)
        if hasattr(self, "visn_fc"):
            x = self.dropout(self.visn_layer_norm(self.visn_fc(x)))
        return x

    def encode_video(self, video: Tensor) -> Tensor:
        """Videos `(B, 3, T, H, W)` to the tokens of their frames, one after another `(B, T·S, D)`."""
        batch = video.shape[0]
        return self.encode_image(video.transpose(1, 2).flatten(0, 1)).view(batch, -1, self.config.text.hidden_size)

    def fuse(self, text: Tensor, text_mask: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """(visual, text) of the fusion encoder."""
        visual_mask = torch.ones(visual.shape[:2], dtype=text_mask.dtype, device=visual.device)
        return self.fusion_encoder(text, text_mask, visual, visual_mask)

    def memory(self, visual: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's memory `(B, S + tokens, D)`, [fusion visual; fusion text], and its padding mask."""
        visual, text = self.fuse(self.text_encoder(text_ids, text_mask), text_mask, visual)
        ones = torch.ones(visual.shape[:2], dtype=text_mask.dtype, device=visual.device)
        return torch.cat([visual, text], dim=1), torch.cat([ones, text_mask], dim=1)

    @torch.no_grad()
    @in_eval_mode
    def search(
        self,
        memory: Tensor,
        memory_mask: Tensor | None,
        *,
        num_beams: int,
        min_length: int,
        max_length: int,
        start: Sequence[int] = (101,),
    ) -> GenerationOutput:
        """Beam search, with every prefix computed again."""

        def next_logits(sequences: Tensor, alive: Tensor) -> Tensor:
            tiled = memory[alive].repeat_interleave(num_beams, dim=0)
            mask = None if memory_mask is None else memory_mask[alive].repeat_interleave(num_beams, dim=0)
            return self.text_decoder(sequences, torch.ones_like(sequences), tiled, mask)[:, -1]

        options = {"num_beams": num_beams, "min_length": min_length, "max_length": max_length, "start": start}
        return stacked(
            beam_search(next_logits, memory.shape[0], device=memory.device, **options), num_beams, memory.device
        )

    # --- tasks

    def caption_loss(self, visual: Tensor, caption_ids: Tensor, caption_mask: Tensor) -> Tensor:
        """The mean cross-entropy over the targets. The prompt's tokens but the last are ignored."""
        logits = self.text_decoder(caption_ids, caption_mask, visual, None)
        labels = shifted_labels(caption_ids, self.config.generation.prompt_tokens)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())

    def scst_loss(self, visual: Tensor, sequences: Tensor, rewards: Tensor) -> Tensor:
        """The self-critical loss of hypotheses `(B, beams, tokens)`, padded with -1, and their rewards `(B, beams)`."""
        losses = []
        for row, beams in enumerate(sequences):
            baseline = rewards[row].mean()
            for ids, reward in zip(beams, rewards[row], strict=True):
                ids = ids[ids >= 0][None]
                logits = self.text_decoder(ids, torch.ones_like(ids), visual[row : row + 1], None)
                log_p = -F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
                score = log_p / ((5 + ids.shape[1] - 1) / 6) ** 0.6
                losses.append(-(score / ids.shape[1]) * (reward - baseline))
        return torch.stack(losses).mean()

    def answer_loss(
        self,
        visual: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answers_per_question: Tensor,
        answer_weights: Tensor,
    ) -> Tensor:
        """Each answer's summed cross-entropy times its weight, summed, over the number of images."""
        memory, mask = (
            each.repeat_interleave(answers_per_question, dim=0)
            for each in self.memory(visual, question_ids, question_mask)
        )
        logits = self.text_decoder(answer_ids, answer_mask, memory, mask)
        labels = shifted_labels(answer_ids)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none").sum(dim=1)
        return (losses * answer_weights).sum() / visual.shape[0]

    @torch.no_grad()
    @in_eval_mode
    def rank_answers(
        self,
        visual: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        k: int,
    ) -> tuple[Tensor, Tensor]:
        """The k likeliest of the given answers: (indices, probabilities), each `(B, k)`, best first."""
        memory, mask = self.memory(visual, question_ids, question_mask)
        return rank_answers(self.text_decoder, memory, mask, answer_ids, answer_mask, k)

    def image_feature(self, visual: Tensor) -> Tensor:
        """Features of image_embeds `(B, S, D)`, or of a video's frames `(B, T·S, D)`, averaged before they are
        normalised."""
        tokens = visual.unflatten(1, (-1, 1 + self.config.vision.num_patches))[:, :, 0]
        return F.normalize(self.vision_proj(tokens).mean(dim=1), dim=-1)

    def box_logits(self, memory: Tensor, memory_mask: Tensor, ids: Tensor) -> Tensor:
        """Logits of the tokens after `ids` `(B, tokens)`, with -1e4 on all that are no place."""
        logits = self.text_decoder(ids, torch.ones_like(ids), memory, memory_mask)
        mask = torch.full_like(logits[0, 0], -1e4)
        mask[FIRST_BIN : FIRST_BIN + BINS] = 0
        return logits + mask

    def grounding_loss(self, visual: Tensor, text_ids: Tensor, text_mask: Tensor, target_boxes: Tensor) -> Tensor:
        """The official loss: each sample's cross-entropy times the weights of every sample of the batch."""
        memory, mask = self.memory(visual, text_ids, text_mask)
        targets = FIRST_BIN + (target_boxes.clamp(0, 1) * (BINS - 1)).long()
        start = targets.new_full((len(targets), 1), START)
        logits = self.box_logits(memory, mask, torch.cat([start, targets[:, :-1]], dim=1))
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        predicted = (logits.detach().argmax(dim=-1) - FIRST_BIN) / (BINS - 1)
        errors = (predicted - target_boxes).abs().clamp(max=5.0)
        weights = errors * (1 - generalised_iou(predicted, target_boxes))[:, None]
        return (losses[:, None] * weights[None]).mean()

    @torch.no_grad()
    @in_eval_mode
    def ground(self, visual: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes `(B, 4)` of center, width and height, their tokens `(B, 4)`, and logits of the places `(B, 4, 337)`."""
        memory, mask = self.memory(visual, text_ids, text_mask)
        ids = torch.full((memory.shape[0], 1), START, device=memory.device)
        logits = []
        for _ in range(4):
            logits.append(self.box_logits(memory, mask, ids)[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(dim=-1, keepdim=True)], dim=1)
        places = torch.stack(logits, dim=1)[..., FIRST_BIN : FIRST_BIN + BINS]
        return (ids[:, 1:] - FIRST_BIN) / (BINS - 1), ids[:, 1:], places


def generalised_iou(one: Tensor, other: Tensor, eps: float = 1e-5) -> Tensor:
    """Of boxes (center, width, height) `(B, 4)`, pair by pair."""
    (x0, y0, x1, y1), (a0, b0, a1, b1) = (
        torch.cat([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], dim=1).unbind(dim=1)
        for box in (one, other)
    )
    shared = (torch.minimum(x1, a1) - torch.maximum(x0, a0)).clamp(min=0) * (
        torch.minimum(y1, b1) - torch.maximum(y0, b0)
    ).clamp(min=0)
    union = (x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared
    hull = (torch.maximum(x1, a1) - torch.minimum(x0, a0)) * (torch.maximum(y1, b1) - torch.minimum(y0, b0))
    return shared / (union + eps) - (hull - union) / (hull + eps)
