"""Classification of images and videos, of texts, and of both together.

The heads are inferred from common practice, not taken from the paper: a linear layer on a class token.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.errors import DataError, printable
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
    require_text,
    wide,
)

if TYPE_CHECKING:
    from mplug2_fast.datasets import Item
    from mplug2_fast.text import Tokenizer

On = Literal["visual", "text", "fused", "two_images"]

_MODULES: dict[str, frozenset[str]] = {
    "visual": frozenset({"vision"}),
    "text": frozenset({"text"}),
    "fused": frozenset({"vision", "text", "fusion"}),
    "two_images": frozenset({"vision", "text", "fusion"}),
}
SEPARATOR = " [SEP] "
"""Separates the texts of a pair."""


class OnClassToken(Task):
    """A linear layer on a class token. Subclasses define what it predicts.

    Args:
        on: what the head sees. "visual": the class token of an image or a video. "text": that of a text or of a pair of
            texts. "fused": that of a text after fusion with an image or a video, for visual entailment and the like.
            "two_images": the same for two images, whose tokens are marked by a learned vector each.
        name: of the task. A model can have several, with different names.
        outputs: size of the layer's output.

    Raises:
        ConfigError: no such `on`, or an invalid name.
    """

    # Set by each instance.
    name: str  # type: ignore[misc]
    modules: frozenset[str]  # type: ignore[misc]
    reads_text: bool  # type: ignore[misc]
    fields: tuple[str, ...]  # type: ignore[misc]

    def __init__(self, on: On, name: str, outputs: int) -> None:
        require(on in _MODULES, f"on must be one of {', '.join(_MODULES)}, got {printable(repr(on))}")
        require(
            isinstance(name, str) and name.isidentifier(), f"{printable(repr(name))} is not a valid name for a task"
        )
        self.on, self.name, self._outputs = on, name, outputs
        self.modules, self.reads_text = _MODULES[on], on != "visual"
        self.num_files = 2 if on == "two_images" else 1
        self.fields = ("text", "label") if self.reads_text else ("label",)

    def head(self, config: Any) -> nn.Module:
        sizes = config.text.hidden_size, self._outputs
        if self.on == "two_images":
            return TwoImages(*sizes, config.text.hidden_dropout_prob)
        return nn.Sequential(nn.Dropout(config.text.hidden_dropout_prob), nn.Linear(*sizes))

    def num_frames(self, config: Any) -> int:
        return 1 if self.on == "two_images" else super().num_frames(config)

    def logits(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The output of the layer `(B, outputs)`.

        Args:
            model: with the modules of this task.
            batch: `video` or `image_embeds` unless `on` is "text"; `text_ids` and `text_mask` `(B, tokens)` unless it
                is "visual". For two images, the frames of `video` are those of the first image, then of the second, and
                `image_embeds` is `(B, 2, S, D)`.
        """
        ids, mask = batch.get("text_ids"), batch.get("text_mask")
        if self.on == "visual":
            pooled = model.pooled(model.embed(batch.get("video"), batch.get("image_embeds")))
        elif self.on == "text":
            pooled = model.encode_text(ids, mask)[:, 0]
        else:
            inputs = batch.get("video"), batch.get("image_embeds")
            visual = self._both(model, *inputs) if self.on == "two_images" else model.embed(*inputs)
            pooled = model.fuse(model.encode_text(ids, mask), mask, visual).text[:, 0]
        return model.heads[self.name](pooled)

    def _both(self, model: Any, video: Tensor | None, image_embeds: Tensor | None) -> Tensor:
        """The tokens of two images `(B, 2 * S, D)`, with their type vectors."""
        if video is not None:
            frames = video.unflatten(2, (2, -1)).transpose(1, 2)
            image_embeds = model.embed(frames.flatten(0, 1), None).unflatten(0, (-1, 2))
        assert image_embeds is not None
        return (image_embeds + model.heads[self.name].types[:, None]).flatten(1, 2)

    def _responding(self, model: Any, tokenizer: Tokenizer, texts_of: Callable[[Tensor], list[Texts]]) -> Respond:
        """A `Respond` that averages predictions over views. `texts_of` turns them into results."""

        def respond(image_embeds: Tensor | None, texts: Sequence[str | None]) -> list[Texts]:
            views, inputs = 1, {}
            if self.on == "two_images":
                given = image_embeds is not None and image_embeds.dim() == 4
                require(given, f"{self.name} needs two images with each text: use Classifier.classify_pairs")
                inputs["image_embeds"] = image_embeds
            elif image_embeds is not None:
                views = image_embeds.shape[1] if image_embeds.dim() == 4 else 1
                inputs["image_embeds"] = image_embeds.flatten(0, image_embeds.dim() - 3)
            if self.reads_text:
                require(all(text is not None for text in texts), "this task needs a text for each file")
                ids, mask = _encoded(model.config, tokenizer, [str(text) for text in texts for _ in range(views)])
                device = next(model.parameters()).device
                inputs |= {"text_ids": ids.to(device), "text_mask": mask.to(device)}
            return texts_of(model.predict(self, **inputs).unflatten(0, (-1, views)).mean(dim=1))

        return respond

    def require_fields(self, item: Item) -> None:
        super().require_fields(item)
        if self.on == "two_images" and len(item.images) != 2:
            found = f"{len(item.images)} images"
            raise DataError(f"the item {printable(item.id)} has {found}, and {self.name} needs 2 in the field images")

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        tensors = {"labels": torch.tensor([self.label_of(item) for item in items])}
        if self.reads_text:
            texts = [str(self.text_of(item, config)) for item in items]
            ids, mask = _encoded(config, tokenizer, texts)
            tensors |= {"text_ids": ids, "text_mask": mask}
        return tensors

    @abstractmethod
    def label_of(self, item: Item) -> int | float:
        """The label as a target of the loss. Raises `DataError` for a label that the task does not know."""

    def targets(self, batch: Mapping[str, Tensor], config: Any) -> int:
        return len(batch["labels"])

    def text_of(self, item: Item, config: Any) -> str | None:
        if not self.reads_text:
            return None
        return item.text if item.text_pair is None else f"{item.text}{SEPARATOR}{item.text_pair}"

    def check_text(self, model: Any, tokenizer: Tokenizer, text: str) -> None:
        require_text(text)


class Classification(OnClassToken):
    """The class of an input: one label per item.

    Args:
        labels: the classes.
        on, name: see `OnClassToken`.

    Raises:
        ConfigError: fewer than two labels, one twice, or no such `on`.
    """

    kind = "classification"
    options = ("num_return",)
    metrics = ("accuracy", "f1")

    def __init__(self, labels: Sequence[str], on: On = "visual", name: str = "classification") -> None:
        self.labels = require_labels(labels)
        super().__init__(on, name, len(self.labels))

    def settings(self) -> dict[str, Any]:
        return {"labels": list(self.labels), "on": self.on, "name": self.name}

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The mean cross-entropy. Batch: see `logits`, and `labels` `(B,)`, int64."""
        return F.cross_entropy(wide(self.logits(model, batch)), batch["labels"])

    def predict(self, model: Any, video: Tensor | None = None, **inputs: Any) -> Tensor:
        """The probabilities of the classes `(B, labels)`, in float32 or float64. Inputs: see `logits`."""
        return wide(self.logits(model, {"video": video, **inputs})).softmax(dim=-1)

    def respond(self, model: Any, tokenizer: Tokenizer, num_return: int = 1) -> Respond:
        require_num_return(num_return, len(self.labels), "labels")
        return self._responding(model, tokenizer, lambda found: best_labels(found, self.labels, num_return))

    def references(self, item: Item) -> Mapping[str, float]:
        return {self.labels[self.label_of(item)]: 1.0}

    def label_of(self, item: Item) -> int:
        label = item.label
        text = str(label).lower() if isinstance(label, bool) else str(label)
        if text not in self.labels:
            known = ", ".join(self.labels[:10]) + (", ..." if len(self.labels) > 10 else "")
            raise DataError(
                f"the item {printable(item.id)} has the label {printable(repr(label))}, and {self.name} knows {known}"
            )
        return self.labels.index(text)


class Regression(OnClassToken):
    """A number for an input, such as the similarity of a pair of texts.

    Args:
        on, name: see `OnClassToken`.
    """

    kind = "regression"
    metrics = ("pearson", "spearman")

    def __init__(self, on: On = "text", name: str = "regression") -> None:
        super().__init__(on, name, 1)

    def settings(self) -> dict[str, Any]:
        return {"on": self.on, "name": self.name}

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The mean squared error. Batch: see `logits`, and `labels` `(B,)`, numbers."""
        found = wide(self.logits(model, batch)[:, 0])
        return F.mse_loss(found, batch["labels"].to(found.dtype))

    def predict(self, model: Any, video: Tensor | None = None, **inputs: Any) -> Tensor:
        """The numbers `(B,)`, in float32 or float64. Inputs: see `logits`."""
        return wide(self.logits(model, {"video": video, **inputs})[:, 0])

    def respond(self, model: Any, tokenizer: Tokenizer) -> Respond:
        def texts_of(found: Tensor) -> list[Texts]:
            return [
                [Alternative(f"{number:.4f}", number)] if math.isfinite(number) else not_finite(model_dtype)
                for number in found.tolist()
            ]

        model_dtype = next(model.parameters()).dtype
        return self._responding(model, tokenizer, texts_of)

    def references(self, item: Item) -> Mapping[str, float]:
        return {str(item.label): 1.0}

    def label_of(self, item: Item) -> float:
        if isinstance(item.label, bool) or not isinstance(item.label, int | float):
            label = printable(repr(item.label))
            raise DataError(f"the item {printable(item.id)} has the label {label}, and {self.name} needs a number")
        return float(item.label)


class TwoImages(nn.Module):
    """A linear layer, and the vectors that mark the tokens of the first and of the second image."""

    def __init__(self, width: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.types = nn.Parameter(torch.empty(2, width))
        self.classes = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(x)


def _encoded(config: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask of texts, truncated to the positions of the model. The texts of a pair are cleaned separately."""
    clean = config.wording.clean_question
    cleaned = [SEPARATOR.join(map(clean, text.split(SEPARATOR))) for text in texts]
    return tokenizer.encode(cleaned, config.text.max_position_embeddings, end=False)
