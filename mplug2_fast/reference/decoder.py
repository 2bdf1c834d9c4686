"""The text decoder, its language-model head, and the official beam search, which recomputes every prefix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.models.mplug2.config import CLS_TOKEN_ID, SEP_TOKEN_ID, TextConfig
from mplug2_fast.reference.bert import (
    BertEmbeddings,
    BertEncoder,
    BertLayer,
    cross_attention_mask,
    self_attention_mask,
)


class PredictionTransform(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class PredictionHead(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.transform = PredictionTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        return F.linear(self.transform(x), word_embeddings, self.bias)


class TextDecoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.bert = nn.Module()
        self.bert.embeddings = BertEmbeddings(config)
        self.bert.encoder = BertEncoder(
            {i: BertLayer(config, cross_attention=True) for i in range(config.text_decode_layers)}
        )
        self.cls = nn.Module()
        self.cls.predictions = PredictionHead(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, memory: Tensor, memory_mask: Tensor | None) -> Tensor:
        """Logits `(batch, tokens, vocabulary)` of whole sequences."""
        x = self.bert.embeddings(input_ids)
        mask = self_attention_mask(attention_mask, x.dtype, causal=True)
        if memory_mask is not None:
            memory_mask = cross_attention_mask(memory_mask, x.dtype)
        for layer in self.bert.encoder.layer.values():
            x = layer(x, mask, memory, memory_mask)
        return self.cls.predictions(x, self.bert.embeddings.word_embeddings.weight)


Hypothesis = tuple[float, Tensor]


def beam_search(
    next_logits: Callable[[Tensor, Tensor], Tensor],
    batch: int,
    *,
    num_beams: int,
    min_length: int,
    max_length: int,
    device: torch.device,
) -> list[list[Hypothesis]]:
    """Beam search over whole prefixes. Finished videos are copied out of the batch.

    Args:
        next_logits: (prefixes `(alive·beams, length)`, which videos are alive `(alive,)`) to the logits
            `(alive·beams, vocabulary)` of the next token.

    Returns for each video its hypotheses (score, ids from [CLS] on), best first.
    """
    alive = torch.arange(batch, device=device)
    sequences = torch.full((batch * num_beams, 1), CLS_TOKEN_ID, dtype=torch.long, device=device)
    cumulative = torch.tensor([0.0] + [-torch.inf] * (num_beams - 1), device=device).repeat(batch, 1)
    hypotheses: list[list[Hypothesis]] = [[] for _ in range(batch)]

    for step in range(max_length):
        log_probs = F.log_softmax(next_logits(sequences, alive).float(), dim=-1)
        vocabulary = log_probs.shape[-1]
        if step < min_length:
            log_probs[:, SEP_TOKEN_ID] = -1e20
        length_penalty = ((5.0 + step + 1) / 6.0) ** 0.6
        scores = ((cumulative.view(-1, 1) + log_probs) / length_penalty).view(len(alive), num_beams * vocabulary)
        scores, picks = scores.topk(num_beams, dim=-1)
        cumulative = scores * length_penalty

        offsets = torch.arange(len(alive), device=device)[:, None] * num_beams
        origin = (picks // vocabulary + offsets).view(-1)
        tokens = picks % vocabulary
        sequences = torch.cat([sequences[origin], tokens.view(-1, 1)], dim=1)

        finished = tokens == SEP_TOKEN_ID
        done = finished[:, 0] | (step + 1 == max_length)
        finished |= done[:, None]
        grouped = sequences.view(len(alive), num_beams, -1)
        for row, beam in finished.nonzero().tolist():
            hypotheses[alive[row]].append((scores[row, beam].item(), grouped[row, beam]))
        if done.any():
            going_on = ~done
            alive, cumulative = alive[going_on], cumulative[going_on]
            sequences = grouped[going_on].flatten(0, 1)
            if not len(alive):
                break
    return [sorted(found, key=lambda h: -h[0]) for found in hypotheses]
