"""Tasks that compare features and learn no labels: CLIP's similarity, and classes given by their names.

Source: CLIP (arXiv 2103.00020), section 3.1.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.errors import printable
from mplug2_fast.nn.contrast import contrast_within
from mplug2_fast.tasks.base import (
    Alternative,
    Respond,
    Task,
    Texts,
    best_labels,
    not_finite,
    require,
    require_labels,
    require_num_return,
    require_options,
    require_text,
    wide,
)
from mplug2_fast.tasks.features import SPACES, clip_ids
from mplug2_fast.tasks.gallery import Gallery
from mplug2_fast.tasks.matching import Scores
from mplug2_fast.tasks.retrieval import MAX_TEXT_LENGTH

if TYPE_CHECKING:
    from mplug2_fast.datasets import Item
    from mplug2_fast.text import Tokenizer


class Clip(Task):
    """Similarity of texts with images or videos by CLIP's features."""

    name = "clip"
    modules = SPACES["clip"].modules
    reads_text = True
    fields = ("caption",)
    metrics = ("retrieval",)
    evaluation = "gallery"

    def encode(self, model: Any, video: Tensor) -> Tensor:
        return SPACES["clip"].encode(model, video)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The cross-entropy of each text among the images of the batch, and of each image among the texts: their mean.

        Args:
            model: with the modules of this task.
            batch: `video` `(B, 3, T, H, W)`; `clip_ids` `(B, tokens)`; `ids` `(B,)`, int64, equal for pairs that
                match each other.
        """
        cosines = self.predict(model, batch["video"], clip_ids=batch["clip_ids"]).similarities
        return contrast_within(wide(SPACES["clip"].scale(model) * cosines), batch["ids"])

    def predict(self, model: Any, video: Tensor, *, clip_ids: Tensor) -> Scores:
        """Cosines of all videos `(N, 3, T, H, W)` with all texts `(M, tokens)`."""
        space = SPACES["clip"]
        found = space.visual(model, self.encode(model, video)) @ model.clip.text(clip_ids).T
        return Scores(found, found.T, found)

    def respond(self, model: Any, tokenizer: Tokenizer) -> Respond:
        """The cosine of each text with its file."""

        def respond(tokens: Tensor, texts: Sequence[str | None]) -> list[Texts]:
            require(all(text is not None for text in texts), "this task needs a text for each file")
            given = [str(text) for text in texts]
            space = SPACES["clip"]
            features = space.texts(model, tokenizer, given, video=False)
            found = (space.visual(model, tokens) * features).float().sum(dim=1).tolist()
            return [
                [Alternative(text, score)] if score == score else not_finite(next(model.parameters()).dtype)
                for text, score in zip(given, found, strict=True)
            ]

        return respond

    def gallery(self, model: Any, tokenizer: Tokenizer, files: int = 0, **options: Any) -> Gallery:
        require(not options.pop("rerank", 0), "clip has no matching head: it ranks by features alone")
        require_options(self, options, ())
        return Gallery(model, tokenizer, files, space=SPACES["clip"])

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        ids = torch.tensor([zlib.crc32((item.media[0] if item.media else item.id).encode()) for item in items])
        return {"clip_ids": clip_ids(config, [item.caption[0] for item in items]), "ids": ids}

    def targets(self, batch: Mapping[str, Tensor], config: Any) -> int:
        return len(batch["ids"])

    def text_of(self, item: Item, config: Any) -> str | None:
        return item.caption[0] if item.caption else item.text

    def references(self, item: Item) -> Mapping[str, float]:
        return dict.fromkeys(item.caption, 1.0)

    def check_text(self, model: Any, tokenizer: Tokenizer, text: str) -> None:
        require_text(text)
        require(len(text) <= MAX_TEXT_LENGTH, f"the text is longer than {MAX_TEXT_LENGTH:,} characters")


class ZeroShot(Task):
    """The class of an image or a video, by the similarity of its features with those of the names of classes.

    Args:
        labels: the names of the classes.
        space: "contrast" for the features of retrieval, "clip" for those of CLIP.
        templates: texts with one {} for the name. The features of a class are the mean over the templates.

    Raises:
        ConfigError: fewer than two labels, one twice, no such space, or a template without {}.
    """

    kind = "zero_shot"
    name = "zero_shot"
    options = ("num_return",)
    metrics = ("accuracy",)
    fields = ("label",)
    modules: frozenset[str]  # type: ignore[misc]

    def __init__(
        self, labels: Sequence[str], space: Literal["contrast", "clip"] = "contrast", templates: Sequence[str] = ("{}",)
    ) -> None:
        labels = require_labels(labels)
        require(space in SPACES, f"space must be one of {', '.join(SPACES)}, got {printable(repr(space))}")
        wrong = next((each for each in templates if each.count("{}") != 1), None)
        require(
            bool(templates) and wrong is None, f"a template has one {{}} for the name, got {printable(repr(wrong))}"
        )
        self.labels, self.space, self.templates = labels, space, tuple(templates)
        self._space = SPACES[space]
        self.modules = self._space.modules

    def settings(self) -> dict[str, Any]:
        return {"labels": list(self.labels), "space": self.space, "templates": list(self.templates)}

    def encode(self, model: Any, video: Tensor) -> Tensor:
        return self._space.encode(model, video)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        raise TypeError("zero-shot classification is not trained: train retrieval or clip")

    def predict(self, model: Any, video: Tensor, *, label_features: Tensor) -> Tensor:
        """The probabilities `(B, labels)` of the classes, in float32 or float64.

        Args:
            model: with the modules of this task.
            video: `(B, 3, T, H, W)`. label_features: `(labels, dim)`, see `label_features`.
        """
        return self._probabilities(model, self.encode(model, video), label_features)

    def _probabilities(self, model: Any, tokens: Tensor, label_features: Tensor) -> Tensor:
        similarities = self._space.visual(model, tokens) @ label_features.T
        return wide(self._space.scale(model) * similarities).softmax(dim=-1)

    @torch.no_grad()
    def label_features(self, model: Any, tokenizer: Tokenizer) -> Tensor:
        """The features `(labels, dim)` of the classes, of norm 1."""
        texts = [template.replace("{}", label) for label in self.labels for template in self.templates]
        video = model.config.vision.num_frames > 1
        found = self._space.texts(model, tokenizer, texts, video=video)
        return F.normalize(found.unflatten(0, (-1, len(self.templates))).mean(dim=1), dim=-1)

    def respond(self, model: Any, tokenizer: Tokenizer, num_return: int = 1) -> Respond:
        require_num_return(num_return, len(self.labels), "labels")
        features = self.label_features(model, tokenizer)

        def respond(tokens: Tensor, texts: Sequence[str | None]) -> list[Texts]:
            views = tokens.shape[1] if tokens.dim() == 4 else 1
            found = self._probabilities(model, tokens.flatten(0, tokens.dim() - 3), features)
            return best_labels(found.unflatten(0, (-1, views)).mean(dim=1), self.labels, num_return)

        return respond

    def references(self, item: Item) -> Mapping[str, float]:
        return {str(item.label): 1.0}
