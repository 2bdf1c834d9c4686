"""A gallery: all files and all texts of a search, ranked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mplug2_fast.errors import ConfigError
from mplug2_fast.info import available_memory
from mplug2_fast.tasks.base import not_finite, require
from mplug2_fast.tasks.features import SPACES, Space, by_length
from mplug2_fast.tasks.matching import Scores, rerank

if TYPE_CHECKING:
    from mplug2_fast.text import Tokenizer


class Gallery:
    """Visual inputs, each encoded once, and their scores with texts.

    Args:
        model: with the modules of retrieval. tokenizer: of the model.
        files: how many visual inputs will be added. Checked against the memory.
        rerank: candidates of each row and column, chosen by their features, that the matching head scores; 0 scores by
            features alone.
        add_similarity: as for `Retrieval.predict`.
        space: of the compared features.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        files: int = 0,
        *,
        rerank: int = 0,
        add_similarity: bool | None = None,
        space: Space = SPACES["contrast"],
    ) -> None:
        require(
            isinstance(rerank, int) and not isinstance(rerank, bool) and rerank >= 0,
            f"rerank must be a whole number from 0 on, got {rerank!r}",
        )
        self._model, self._tokenizer = model, tokenizer
        self._files, self._rerank, self._add_similarity = files, rerank, add_similarity
        self._space = space
        self._features: list[Tensor] = []
        self._embeds: list[Tensor] = []
        self._video = False

    def __len__(self) -> int:
        return len(self._features)

    @torch.inference_mode()
    def add(self, image_embeds: Tensor) -> list[bool]:
        """Adds visual inputs `(B, S, D)` of `encode_video` and returns which of them are finite. Leaves out the others.

        Raises `ConfigError` if the tokens of all files, which re-ranking keeps on the CPU, do not fit into its memory.
        """
        if not self._features:
            self._video = self._model.config.frames_of(image_embeds.shape[1]) > 1
            self._require_memory(image_embeds[0].nbytes)
        features = self._space.visual(self._model, image_embeds).float()
        finite = features.isfinite().all(dim=1)
        self._features.extend(features[finite].cpu())
        if self._rerank:
            self._embeds.extend(image_embeds[finite].cpu())
        return finite.tolist()

    @torch.inference_mode()
    def scores(self, texts: Sequence[str]) -> Scores:
        """Scores of all visual inputs with the texts, on the CPU. Pairs that are not re-ranked have -100.

        Raises:
            ConfigError: there are no texts, or no visual inputs. NotFiniteError: the model's results are not finite.
        """
        require(len(texts) > 0, "there are no texts to compare with")
        require(len(self) > 0, "there are no images or videos to compare with")
        if not self._rerank:
            features = self._space.texts(self._model, self._tokenizer, texts, video=self._video)
            similarities = torch.stack(self._features) @ features.float().cpu().T
            return self._finite(Scores(similarities, similarities.T, similarities))
        features, states, mask = self._encoded(texts)
        similarities = torch.stack(self._features) @ features.T
        device = next(self._model.parameters()).device
        return self._finite(
            rerank(
                self._model,
                lambda row: self._embeds[row][None].to(device),
                states,
                mask,
                similarities,
                self._rerank,
                add_similarity=self._video if self._add_similarity is None else self._add_similarity,
            )
        )

    def _encoded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Features `(texts, dim)`, hidden states `(texts, tokens, D)` and mask of the texts, on the CPU."""
        model, weight = self._model, next(self._model.parameters())
        config = model.config
        ids, mask = config.wording.descriptions(self._tokenizer, list(texts), video=self._video, training=False)
        states = torch.zeros(*ids.shape, config.text.hidden_size, dtype=weight.dtype)
        features = torch.zeros(len(ids), config.contrast.embed_dim)
        for rows, longest in by_length(mask, weight.device):
            some, valid = ids[rows, :longest].to(weight.device), mask[rows, :longest].to(weight.device)
            text = model.encode_text(some, valid)
            features[rows], states[rows, :longest] = model.text_features(text).float().cpu(), text.cpu()
        return features, states, mask

    def _finite(self, scores: Scores) -> Scores:
        if not all(each.isfinite().all() for each in scores):
            raise not_finite(next(self._model.parameters()).dtype)
        return scores

    def _require_memory(self, bytes_of_file: int) -> None:
        needed, free = self._files * bytes_of_file, available_memory()
        if self._rerank and needed > free:
            raise ConfigError(
                f"re-ranking keeps the visual tokens of {self._files:,} files in memory, which takes "
                f"{needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free: take fewer files, a smaller dtype, "
                "or no re-ranking"
            )
