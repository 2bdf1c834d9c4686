"""A stand-in for the official mPLUG-2 of both tasks, and its beam search; see `official_vision`, `official_bert`."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.acceleration.official_bert import (
    BertLMHeadModel,
    BertModel,
    BertPrefixModel,
    FusionModel,
    LanguageModel,
    bert_config,
)
from tests.acceleration.official_vision import XCLIP
from tests.golden.cases import CAPTIONING, GoldenCase

START, END, PAD = 101, 102, 0


class TextGenerator:
    """The official search: every step passes whole prefixes, and a memory tiled over beams and reordered with them."""

    def __init__(self, config: dict, decoder: LanguageModel) -> None:
        self.decoder = decoder
        self.beams, self.low, self.high = config["beam_size"], config["min_length"], config["max_length"]

    def translate_batch(self, states: Tensor, mask: Tensor) -> list[list[tuple[float, list[int]]]]:
        beams, count = self.beams, states.shape[0]
        found: list[list[tuple[float, list[int]]]] = [[] for _ in range(count)]
        videos = list(range(count))
        states, mask = (tile(t, beams) for t in (states, mask))
        alive = torch.full((count * beams, 1), START)
        cumulative = torch.tensor([0.0] + [-torch.inf] * (beams - 1)).repeat(count)
        for step in range(self.high):
            output = self.decoder(
                alive,
                encoder_hidden_states=states,
                encoder_attention_mask=mask,
                return_dict=True,
                is_decoder=True,
                reduction="none",
            )
            log_probs = F.log_softmax(output.logits[:, -1, :], dim=-1)
            if step < self.low:
                log_probs[:, END] = -1e20
            penalty = ((5.0 + step + 1) / 6.0) ** 0.6
            scores = (cumulative[:, None] + log_probs) / penalty
            vocabulary = scores.shape[-1]
            scores, picks = scores.view(len(videos), -1).topk(beams, dim=-1)
            rows = (picks // vocabulary + torch.arange(len(videos))[:, None] * beams).flatten()
            tokens = picks % vocabulary
            alive = torch.cat([alive.index_select(0, rows), tokens.flatten()[:, None]], dim=1)
            states, mask = states.index_select(0, rows), mask.index_select(0, rows)
            cumulative = (scores * penalty).flatten()
            ended = tokens == END
            finished = ended[:, 0] | (step + 1 == self.high)
            for i, video in enumerate(videos):
                for j in range(beams):
                    if ended[i, j] or finished[i]:
                        found[video].append((scores[i, j].item(), alive[i * beams + j].tolist()))
            kept = (~finished).nonzero().flatten()
            if not len(kept):
                break
            if len(kept) < len(videos):
                videos = [videos[i] for i in kept.tolist()]
                rows = (kept[:, None] * beams + torch.arange(beams)).flatten()
                alive, states, mask, cumulative = (t.index_select(0, rows) for t in (alive, states, mask, cumulative))
        return [sorted(hypotheses, key=lambda h: -h[0]) for hypotheses in found]


def tile(x: Tensor, count: int) -> Tensor:
    return x.repeat_interleave(count, dim=0)


class MPLUG2(nn.Module):
    """Captioning; the subclass answers questions. `bert`, `config` and `clip` come from the official files."""

    decoder: type[LanguageModel] = BertPrefixModel

    def __init__(self, bert: dict, config: dict, clip: dict) -> None:
        super().__init__()
        self.visual_encoder = XCLIP(clip, config["image_res"], config["model_num_frames"])
        self.text_encoder = BertModel(bert_config(bert, num_hidden_layers=bert["text_encoder_layers"]))
        self.fusion_encoder = FusionModel(bert_config(bert))
        self.text_decoder = self.decoder(
            bert_config(bert, num_hidden_layers=bert["text_decode_layers"], add_cross_attention=True)
        )
        self.beam_generator = TextGenerator(config, self.text_decoder)
        width = bert["hidden_size"]
        self.visn_emb_norm = nn.LayerNorm(width, eps=1e-12)
        self.visn_emb_dropout = nn.Dropout(bert["hidden_dropout_prob"])
        self.large = width != clip["width"]
        if self.large:
            self.visn_fc = nn.Linear(clip["width"], width)
            self.visn_layer_norm = nn.LayerNorm(width, eps=1e-12)
            self.dropout = nn.Dropout(bert["hidden_dropout_prob"])
        self.prompt_length = len(config.get("prompt", "").split())

    @classmethod
    def of(cls, case: GoldenCase) -> MPLUG2:
        kind = MPLUG2 if case.name in CAPTIONING else MPLUG2ForQuestions
        described = case.description
        model = kind(described["bert"], described["config"], described["clip"])
        model.load_state_dict(case.state_dict)
        return model.eval()

    def encode_visual(self, image: Tensor) -> Tensor:
        embeds = self.visual_encoder.visual(image, skip_last_layer=True, use_checkpoint=False)
        if self.large:
            embeds = self.dropout(self.visn_layer_norm(self.visn_fc(embeds)))
        return embeds

    def universal(self, embeds: Tensor) -> Tensor:
        mask = torch.ones(embeds.shape[:-1], dtype=torch.long)
        return self.text_encoder(
            encoder_embeds=embeds,
            attention_mask=mask,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            return_dict=True,
            mode="v_module",
        ).last_hidden_state

    def encode_video(self, image: Tensor) -> tuple[Tensor, Tensor]:
        embeds = self.encode_visual(image.to(next(self.parameters()).dtype))
        embeds = self.visn_emb_dropout(self.visn_emb_norm(embeds + self.universal(embeds)))
        return embeds, torch.ones(embeds.shape[:-1], dtype=torch.long)

    def forward(self, image: Tensor, answer: SimpleNamespace | None = None, train: bool = True):
        embeds, mask = self.encode_video(image)
        if not train:
            return self.beam_generator.translate_batch(embeds, mask)
        targets = answer.input_ids.masked_fill(answer.input_ids == PAD, -100)
        targets[:, : self.prompt_length] = -100
        return self.text_decoder(
            answer.input_ids,
            attention_mask=answer.attention_mask,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            labels=targets,
            return_dict=True,
            reduction="none",
        ).loss

    def generate(self, case: GoldenCase):
        with torch.no_grad():
            return self(case.video, train=False)

    def loss(self, case: GoldenCase) -> Tensor:
        return self(case.video, pair(case, "caption"))


class MPLUG2ForQuestions(MPLUG2):
    decoder = BertLMHeadModel

    def encode_question(self, image: Tensor, question: SimpleNamespace) -> tuple[Tensor, Tensor]:
        embeds, image_mask = self.encode_video(image)
        text = self.text_encoder(
            question.input_ids, attention_mask=question.attention_mask, return_dict=True
        ).last_hidden_state
        fused = self.fusion_encoder(
            encoder_embeds=text,
            attention_mask=question.attention_mask,
            encoder_hidden_states=embeds,
            encoder_attention_mask=image_mask,
            return_dict=False,
        )
        return torch.cat(fused, dim=1), torch.cat([image_mask, question.attention_mask], dim=1)

    def forward(self, image, question, answer=None, k=None, weights=None, train=True, rerank=False):
        states, mask = self.encode_question(image, question)
        if not train:
            if rerank:
                return self.rank_answer(states, mask, answer.input_ids, answer.attention_mask, k)
            return self.beam_generator.translate_batch(states, mask)
        rows = [row for row, count in enumerate(k) for _ in range(count)]
        targets = answer.input_ids.masked_fill(answer.input_ids == PAD, -100)
        losses = self.text_decoder(
            answer.input_ids,
            attention_mask=answer.attention_mask,
            encoder_hidden_states=states[rows],
            encoder_attention_mask=mask[rows],
            labels=targets,
            return_dict=True,
            reduction="none",
        ).loss
        return (weights * losses).sum() / image.shape[0]

    def rank_answer(self, states: Tensor, mask: Tensor, ids: Tensor, atts: Tensor, k: int) -> tuple[Tensor, Tensor]:
        start = ids[0, 0].repeat(states.shape[0], 1)
        first = self.text_decoder(
            start, encoder_hidden_states=states, encoder_attention_mask=mask, return_dict=True, reduction="none"
        ).logits[:, 0, :]
        probs, top = first.softmax(dim=1).index_select(1, ids[:, 1]).topk(k, dim=1)
        chosen = ids[top.flatten()]
        loss = self.text_decoder(
            chosen,
            attention_mask=atts[top.flatten()],
            encoder_hidden_states=tile(states, k),
            encoder_attention_mask=tile(mask, k),
            labels=chosen.masked_fill(chosen == PAD, -100),
            return_dict=True,
            reduction="none",
        ).loss
        probs, order = (probs.log() - loss.view(-1, k)).softmax(dim=-1).topk(k, dim=1)
        return top.gather(1, order), probs

    def generate(self, case: GoldenCase):
        with torch.no_grad():
            return self(case.video, pair(case, "question"), train=False)

    def loss(self, case: GoldenCase) -> Tensor:
        inputs = case.inputs
        counts, weights = inputs["answers_per_question"].tolist(), inputs["answer_weights"]
        return self(case.video, pair(case, "question"), pair(case, "answer"), k=counts, weights=weights)


def pair(case: GoldenCase, name: str) -> SimpleNamespace:
    """The tokenizer output for the input of that name."""
    return SimpleNamespace(input_ids=case.inputs[f"{name}_ids"], attention_mask=case.inputs[f"{name}_mask"])
