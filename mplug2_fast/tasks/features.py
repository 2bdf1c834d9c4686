"""The spaces in which texts and files are compared: the model's own contrast, and CLIP's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mplug2_fast.text import Tokenizer

TEXT_BATCH = 128
"""Texts per batch."""


class Space(ABC):
    """A space of features.

    Attributes:
        modules: the modules that the model needs.
    """

    modules: ClassVar[frozenset[str]]

    def encode(self, model: Any, video: Tensor) -> Tensor:
        """Video `(B, 3, T, H, W)` to the tokens `(B, S, D)` that `visual` takes."""
        return model.encode_video(video)

    @abstractmethod
    def visual(self, model: Any, tokens: Tensor) -> Tensor:
        """Tokens `(B, S, D)` to features `(B, dim)` of norm 1."""

    def texts(self, model: Any, tokenizer: Tokenizer, texts: Sequence[str], *, video: bool) -> Tensor:
        """Texts to features `(texts, dim)` of norm 1. `video`: whether they are compared with videos of several
        frames."""
        ids, lengths = self._tokens(model, tokenizer, texts, video)
        order, device = list(by_length(lengths)), next(model.parameters()).device
        found = [
            self._features(model, ids[rows, :longest].to(device), lengths[rows].to(device)) for rows, longest in order
        ]
        return torch.cat(found)[torch.cat([rows for rows, _ in order]).argsort().to(device)]

    @abstractmethod
    def _tokens(self, model: Any, tokenizer: Tokenizer, texts: Sequence[str], video: bool) -> tuple[Tensor, Tensor]:
        """Ids `(texts, tokens)` and lengths `(texts,)`, on the CPU."""

    @abstractmethod
    def _features(self, model: Any, ids: Tensor, lengths: Tensor) -> Tensor:
        """Ids and lengths to features `(texts, dim)`."""

    @abstractmethod
    def scale(self, model: Any) -> Tensor:
        """The factor of similarities before a softmax."""


class Contrast(Space):
    """The projections that the model learns in pre-training."""

    modules = frozenset({"vision", "text", "contrast"})

    def visual(self, model: Any, tokens: Tensor) -> Tensor:
        return model.visual_features(tokens)

    def _tokens(self, model: Any, tokenizer: Tokenizer, texts: Sequence[str], video: bool) -> tuple[Tensor, Tensor]:
        ids, mask = model.config.wording.descriptions(tokenizer, list(texts), video=video, training=False)
        return ids, mask.sum(dim=1)

    def _features(self, model: Any, ids: Tensor, lengths: Tensor) -> Tensor:
        return model.text_features(model.encode_text(ids, mask_of(lengths, ids)))

    def scale(self, model: Any) -> Tensor:
        return 1 / model.contrast.temperature


class Clip(Space):
    """CLIP's text tower and its projection of images, which the official files keep from CLIP."""

    modules = frozenset({"vision", "clip"})

    def encode(self, model: Any, video: Tensor) -> Tensor:
        """The class tokens `(B, 1, width)` of the vision encoder. A single frame does not pass the temporal modules."""
        return model.visual(video, temporal=video.shape[2] > 1)[:, :1]

    def visual(self, model: Any, tokens: Tensor) -> Tensor:
        return model.clip.visual(tokens[:, 0])

    def _tokens(self, model: Any, tokenizer: Tokenizer, texts: Sequence[str], video: bool) -> tuple[Tensor, Tensor]:
        ids = clip_ids(model, texts)
        return ids, 1 + ids.argmax(dim=1)  # the end token has the largest id

    def _features(self, model: Any, ids: Tensor, lengths: Tensor) -> Tensor:
        return model.clip.text(ids)

    def scale(self, model: Any) -> Tensor:
        return model.clip.logit_scale.exp()


SPACES: dict[str, Space] = {"contrast": Contrast(), "clip": Clip()}
"""Name to space."""


def by_length(lengths: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Numbers of texts in batches, the shortest texts first, and the length of the longest text of each batch."""
    for rows in lengths.argsort(stable=True).split(TEXT_BATCH):
        yield rows, int(lengths[rows[-1]])


def mask_of(lengths: Tensor, ids: Tensor) -> Tensor:
    """The mask `(texts, tokens)` of ids: 1 for tokens and 0 for padding."""
    return (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


def clip_ids(model_or_config: Any, texts: Sequence[str]) -> Tensor:
    """Ids of CLIP's tokenizer. Raises `ConfigError` for a model with another vocabulary."""
    from mplug2_fast.clip_tokenizer import clip_tokenizer
    from mplug2_fast.tasks.base import require

    sizes = getattr(model_or_config, "config", model_or_config).clip
    tokenizer = clip_tokenizer()
    require(
        sizes.bpe_size == tokenizer.vocab_size,
        f"CLIP's vocabulary has {tokenizer.vocab_size} tokens, and the model has {sizes.bpe_size}",
    )
    return tokenizer.encode(texts, sizes.context_length)
