"""The spaces in which texts and files are compared: the model's own contrast, and CLIP's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mplug2_fast.text import Tokenizer

TEXT_BATCH = {"cpu": 32}
"""Texts per batch. Small batches have less padding, large ones fill a GPU."""


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
        return self.features(model, *self._tokens(model, tokenizer, texts, video))

    def features(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask `(texts, tokens)` to features `(texts, dim)` of norm 1.

        Texts of similar length are encoded together, without their padding. Under `torch.compile` all are encoded at
        once, because lengths would break the graph.
        """
        device = next(model.parameters()).device
        if torch.compiler.is_compiling():
            return self._features(model, ids.to(device), mask.to(device))
        order = list(by_length(mask, device))
        found = [
            self._features(model, ids[rows, :longest].to(device), mask[rows, :longest].to(device))
            for rows, longest in order
        ]
        return torch.cat(found)[torch.cat([rows for rows, _ in order]).argsort().to(device)]

    @abstractmethod
    def _tokens(self, model: Any, tokenizer: Tokenizer, texts: Sequence[str], video: bool) -> tuple[Tensor, Tensor]:
        """Ids and mask `(texts, tokens)`, on the CPU."""

    @abstractmethod
    def _features(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask to features `(texts, dim)`."""

    @abstractmethod
    def scale(self, model: Any) -> Tensor:
        """The factor of similarities before a softmax."""


class Contrast(Space):
    """The projections that the model learns in pre-training."""

    modules = frozenset({"vision", "text", "contrast"})

    def visual(self, model: Any, tokens: Tensor) -> Tensor:
        return model.visual_features(tokens)

    def _tokens(self, model: Any, tokenizer: Tokenizer, texts: Sequence[str], video: bool) -> tuple[Tensor, Tensor]:
        return model.config.wording.descriptions(tokenizer, list(texts), video=video, training=False)

    def _features(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        return model.text_features(model.encode_text(ids, mask))

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
        last = ids.argmax(dim=1, keepdim=True)  # the end token has the largest id
        return ids, torch.arange(ids.shape[1]) <= last

    def _features(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        return model.clip.text(ids)

    def scale(self, model: Any) -> Tensor:
        return model.clip.logit_scale.exp()


SPACES: dict[str, Space] = {"contrast": Contrast(), "clip": Clip()}
"""Name to space."""


def by_length(mask: Tensor, device: torch.device) -> Iterator[tuple[Tensor, int]]:
    """Numbers of the texts of a mask `(texts, tokens)` in batches for a device, the shortest texts first, and the
    length of the longest text of each batch."""
    tokens = torch.arange(1, 1 + mask.shape[1], device=mask.device)
    lengths = (mask.bool() * tokens).amax(dim=1).cpu()
    for rows in lengths.argsort(stable=True).split(TEXT_BATCH.get(device.type, 128)):
        yield rows, max([1, *lengths[rows[-1:]].tolist()])


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
