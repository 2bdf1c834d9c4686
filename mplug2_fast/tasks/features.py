"""The spaces in which texts and files are compared: the model's own contrast, and CLIP's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from mplug2_fast.text import Tokenizer


class Space(ABC):
    """One space.

    Attributes:
        modules: that the model needs.
    """

    modules: ClassVar[frozenset[str]]

    def encode(self, model: Any, video: Tensor) -> Tensor:
        """Video `(B, 3, T, H, W)` to the tokens `(B, S, D)` that `visual` takes."""
        return model.encode_video(video)

    @abstractmethod
    def visual(self, model: Any, tokens: Tensor) -> Tensor:
        """Tokens `(B, S, D)` to features `(B, dim)` of norm 1."""

    @abstractmethod
    def texts(self, model: Any, tokenizer: Tokenizer, texts: Sequence[str], *, video: bool) -> Tensor:
        """Texts to features `(texts, dim)` of norm 1. `video`: whether they are compared with videos of several
        frames."""

    @abstractmethod
    def scale(self, model: Any) -> Tensor:
        """What similarities are multiplied by before a softmax."""


class Contrast(Space):
    """The projections that the model learns in pre-training."""

    modules = frozenset({"vision", "text", "contrast"})

    def visual(self, model: Any, tokens: Tensor) -> Tensor:
        return model.visual_features(tokens)

    def texts(self, model: Any, tokenizer: Tokenizer, texts: Sequence[str], *, video: bool) -> Tensor:
        ids, mask = model.config.wording.descriptions(tokenizer, list(texts), video=video, training=False)
        device = next(model.parameters()).device
        return model.text_features(model.encode_text(ids.to(device), mask.to(device)))

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

    def texts(self, model: Any, tokenizer: Tokenizer, texts: Sequence[str], *, video: bool) -> Tensor:
        return model.clip.text(clip_ids(model, texts).to(next(model.parameters()).device))

    def scale(self, model: Any) -> Tensor:
        return model.clip.logit_scale.exp()


SPACES: dict[str, Space] = {"contrast": Contrast(), "clip": Clip()}
"""Name to space."""


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
