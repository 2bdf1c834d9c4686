"""The text decoder, its language-model head, and the official beam search, which recomputes every prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.models.config import CLS_TOKEN_ID, PAD_TOKEN_ID, SEP_TOKEN_ID
from mplug2_fast.nn.config import StacksConfig
from mplug2_fast.outputs import GenerationOutput
from mplug2_fast.reference.bert import (
    BertEmbeddings,
    BertEncoder,
    BertLayer,
    cross_attention_mask,
    self_attention_mask,
)


class PredictionTransform(nn.Module):
    def __init__(self, config: StacksConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class PredictionHead(nn.Module):
    def __init__(self, config: StacksConfig) -> None:
        super().__init__()
        self.transform = PredictionTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        return F.linear(self.transform(x), word_embeddings, self.bias)


class TextDecoder(nn.Module):
    def __init__(self, config: StacksConfig) -> None:
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
    start: Sequence[int] = (CLS_TOKEN_ID,),
) -> list[list[Hypothesis]]:
    """Beam search over whole prefixes. Finished videos are copied out of the batch.

    Args:
        next_logits: (prefixes `(alive·beams, length)`, which videos are alive `(alive,)`) to the logits
            `(alive·beams, vocabulary)` of the next token.
        start: ids that all sequences start with.

    Returns for each video its hypotheses (score, ids from [CLS] on), best first.
    """
    alive = torch.arange(batch, device=device)
    sequences = torch.tensor([list(start)], device=device).repeat(batch * num_beams, 1)
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


def stacked(found: Sequence[Sequence[Hypothesis]], num_return: int, device: torch.device) -> GenerationOutput:
    """The `num_return` best hypotheses of each row as tensors, padded with -1 and -inf."""
    found = [hypotheses[:num_return] for hypotheses in found]
    length = max(len(ids) for hypotheses in found for _, ids in hypotheses)
    sequences = torch.full((len(found), num_return, length), -1, dtype=torch.long, device=device)
    scores = torch.full((len(found), num_return), -torch.inf, device=device)
    for i, hypotheses in enumerate(found):
        for j, (score, ids) in enumerate(hypotheses):
            sequences[i, j, : len(ids)] = ids
            scores[i, j] = score
    return GenerationOutput(sequences, scores)


def shifted_labels(input_ids: Tensor, prompt_tokens: int = 0) -> Tensor:
    """Targets `(batch, tokens - 1)` of teacher forcing. Padding and `prompt_tokens` after [CLS] are ignored."""
    labels = input_ids[:, 1:].long()
    labels = labels.masked_fill(labels == PAD_TOKEN_ID, -100)
    labels[:, :prompt_tokens] = -100
    return labels


def rank_answers(
    decoder: TextDecoder, memory: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k likeliest of the given answers `(A, tokens)`: (indices, probabilities), each `(B, k)`, best first."""
    batch = memory.shape[0]
    start = torch.full((batch, 1), CLS_TOKEN_ID, dtype=torch.long, device=memory.device)
    first_probs = decoder(start, torch.ones_like(start), memory, mask)[:, 0].float().softmax(dim=-1)
    top_probs, top = first_probs[:, answer_ids[:, 1]].topk(k, dim=-1)

    memory, mask = memory.repeat_interleave(k, dim=0), mask.repeat_interleave(k, dim=0)
    ids = answer_ids[top.flatten()]
    logits = decoder(ids, answer_mask[top.flatten()], memory, mask)
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), shifted_labels(ids), reduction="none").sum(dim=1)
    probs, order = (top_probs.log() - nll.view(batch, k)).softmax(dim=-1).sort(dim=-1, descending=True)
    return top.gather(1, order), probs
