"""The compiled peer's decoder: teacher forcing, and one step of a beam search with static caches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.peer_bert import Embeddings, Layer
from mplug2_fast.models.mplug2.config import PAD_TOKEN_ID, SEP_TOKEN_ID, TextConfig


class Decoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.text_decode_layers)])
        self.head, self.head_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size))
        self.sizes: tuple[int, ...] = ()

    def logits(self, x: Tensor) -> Tensor:
        x = self.head_norm(F.gelu(self.head(x)))
        return F.linear(x, self.embeddings.word.weight, self.head_bias).float()

    def token_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy over the labels that are not -100."""
        return F.cross_entropy(self.logits(x).flatten(0, 1), labels.flatten())

    def loss(self, tokens: Tensor, memory: Tensor, prompt_tokens: int) -> Tensor:
        """Teacher forcing. Padding comes last: what is not padding never sees it."""
        x = self.embeddings(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x, memory, None, True)
        labels = tokens[:, 1:].masked_fill(tokens[:, 1:] == PAD_TOKEN_ID, -100)
        labels[:, :prompt_tokens] = -100
        return self.token_loss(x[:, :-1], labels)

    def start(self, memory: Tensor, beams: int, steps: int) -> None:
        sizes = (memory.shape[0], beams, steps, memory.shape[1])
        for layer in self.layers:
            if sizes != self.sizes:
                layer.allocate(*sizes)
            layer.remember(memory)
        self.sizes = sizes

    def best(self, x: Tensor, cumulative: Tensor, penalty: Tensor, end_bias: Tensor) -> tuple[Tensor, ...]:
        """The best beams among all continuations: scores, cumulative log-probabilities, origin, tokens."""
        log_probs = self.logits(x).log_softmax(dim=-1)
        log_probs[..., SEP_TOKEN_ID] += end_bias
        scores = (cumulative[:, :, None] + log_probs) / penalty
        scores, picks = scores.flatten(1).topk(x.shape[1], dim=-1)
        return scores, scores * penalty, picks // log_probs.shape[-1], picks % log_probs.shape[-1]

    def states(self, tokens: Tensor, step: Tensor, origin: Tensor, memory_mask: Tensor | None) -> Tensor:
        """Hidden states `(batch, beams, D)` of the newest tokens."""
        x = self.embeddings(tokens, step)
        seen = torch.arange(self.sizes[2], device=tokens.device)[None] <= step
        for layer in self.layers:
            x = layer.step(x, step, seen, origin, memory_mask)
        return x

    def step(
        self,
        tokens: Tensor,
        step: Tensor,
        origin: Tensor,
        memory_mask: Tensor | None,
        cumulative: Tensor,
        penalty: Tensor,
        end_bias: Tensor,
    ) -> tuple[Tensor, ...]:
        return self.best(self.states(tokens, step, origin, memory_mask), cumulative, penalty, end_bias)
