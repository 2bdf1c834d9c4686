"""The base class of tasks, and what tasks share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mplug2_fast.errors import ConfigError, DataError, NotFiniteError, printable

if TYPE_CHECKING:
    from mplug2_fast.datasets import Item
    from mplug2_fast.tasks.gallery import Gallery
    from mplug2_fast.text import Tokenizer
    from mplug2_fast.video import Preparation
    from mplug2_fast.video.preparation import Box


class Alternative(NamedTuple):
    """One result for a file: a text and its score."""

    text: str
    score: float

    @property
    def box(self) -> Box | None:
        """(center x, center y, width, height) in [0, 1] of what the model sees, for tasks that find boxes."""
        return None


class BoxAlternative(Alternative):
    """A box with its text and score. It unpacks into text and score, like other alternatives."""

    _box: Box | None

    def __new__(cls, text: str, score: float, box: Box | None = None) -> BoxAlternative:
        self = super().__new__(cls, text, score)
        self._box = box
        return self

    @property
    def box(self) -> Box | None:
        return self._box


Texts = list[Alternative] | NotFiniteError
"""The results for one video, best first. If the model's output is not finite, the error instead."""

Respond = Callable[[Any, Sequence[str | None]], list[Texts]]
"""Takes image_embeds `(B, S, D)` and a text or None for each of the B videos. Returns the results of each video.

A task on texts alone gets None for image_embeds. Classification also takes several views of a file,
`(B, views, S, D)`."""


class Task(ABC):
    """One task: the modules that it needs, its head, its loss, and its predictions.

    A task holds no parameters and no state. One instance serves any number of models.

    Attributes:
        kind: the name of its class in `mplug2_fast.tasks.KINDS`, for tasks with settings.
        name: its name in checkpoints and on the command line.
        modules: the modules of the model that it uses.
        reads_text: whether each video comes with a text, such as a question.
        lengths: defaults of min_length and max_length for generated text, in tokens after [CLS].
        options: names of the options that `respond` takes.
        fields: the fields of an item that training and evaluation need, besides its video or image.
        metrics: names in `mplug2_fast.evaluation.METRICS`, the main one first.
        num_files: images or videos per item, if it takes files.
        finds_boxes: whether each result has a `box`.
        soft_targets: whether the task has `logits(model, batch)`, and its loss takes the logits of a teacher as `soft`
            and their weight as `alpha`.
        evaluation: "items" evaluates each item alone; "gallery" ranks all files and all captions of the data set
            against each other.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str]
    modules: ClassVar[frozenset[str]]
    reads_text: ClassVar[bool] = False
    lengths: ClassVar[tuple[int, int]] = (1, 20)
    options: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[tuple[str, ...]] = ()
    num_files: int = 1
    finds_boxes: ClassVar[bool] = False
    soft_targets: ClassVar[bool] = False
    evaluation: ClassVar[Literal["items", "gallery"]] = "items"

    @property
    def reads_files(self) -> bool:
        """Whether it takes images or videos. Without them, `respond` gets None for their tokens."""
        return "vision" in self.modules

    def settings(self) -> Mapping[str, Any]:
        """The arguments that rebuild the task, as plain values for checkpoints: `KINDS[task.kind](**settings)`. Empty
        if the name is enough."""
        return {}

    def head(self, config: Any) -> nn.Module | None:
        """A new head, with the parameters that only this task has, or None."""
        return None

    def training_state(self, model: Any, queue_size: int, momentum: float) -> nn.Module | None:
        """The state of the loss besides model and batch, such as queues. `update(model)` is called before each step.

        Args:
            model: the trained model. queue_size: features to keep; 0 for none. momentum: of copies of the model.
        """
        return None

    @abstractmethod
    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The training loss of a batch: one number."""

    @abstractmethod
    def predict(self, model: Any, **inputs: Any) -> Any:
        """The results for a batch of tensors. The model is in evaluation mode, and no gradient is recorded."""

    @abstractmethod
    def respond(self, model: Any, tokenizer: Tokenizer, **options: Any) -> Respond:
        """A function that turns encoded videos and texts into results. Raises `ConfigError` for bad options."""

    def encode(self, model: Any, video: Tensor) -> Tensor:
        """Video `(B, 3, T, H, W)` to the tokens `(B, S, D)` that `respond` takes."""
        return model.encode_video(video)

    def num_frames(self, config: Any) -> int:
        """Frames of a clip, if the user does not set their number."""
        return config.vision.num_frames

    def preparation(self, config: Any) -> Preparation:
        """How files become the input of a model for this task."""
        return config.preparation

    def require_fields(self, item: Item) -> None:
        """Raises `DataError` for an item without the video, image or field that the task needs."""
        missing = [name for name in self.fields if getattr(item, name) in (None, "", (), {})]
        if self.reads_files and not item.media:
            missing.insert(0, "video or image")
        if missing:
            raise DataError(f"the item {printable(item.id)} has no {' and no '.join(missing)}, which {self.name} needs")

    def samples(self, item: Item) -> list[Item]:
        """The training samples of an item: one for each of its targets."""
        return [item]

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        """The texts and targets of samples, on the CPU: the inputs of `loss` besides `video`."""
        raise ConfigError(f"{self.name} cannot be trained from items: it has no `batch` method")

    def targets(self, batch: Mapping[str, Tensor], config: Any) -> int:
        """The number of targets that the loss averages over. It weights the losses of parts of a batch."""
        return len(next(iter(batch.values())))

    def text_of(self, item: Item, config: Any) -> str | None:
        """The text of an item for `respond`."""
        return item.question if self.reads_text else None

    def gallery(self, model: Any, tokenizer: Tokenizer, files: int = 0, **options: Any) -> Gallery:
        """An empty gallery, which ranks files and texts against each other. Raises `ConfigError` for bad options.

        Args:
            files: how many will be added.
        """
        raise ConfigError(f"{self.name} does not rank files and texts for each other: it has no `gallery` method")

    def references(self, item: Item) -> Mapping[str, float]:
        """The correct results of an item and their weights. Metrics compare predictions with them."""
        raise ConfigError(f"{self.name} cannot be evaluated on items: it has no `references` method")

    def check_text(self, model: Any, tokenizer: Tokenizer, text: str) -> None:  # noqa: B027 (nothing to check)
        """Raises `ConfigError` for a text that the model cannot read."""


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, for losses. A float64 tensor is returned unchanged."""
    return x if x.dtype is torch.float64 else x.float()


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` with the message, unless the condition holds."""
    if not condition:
        raise ConfigError(message)


MAX_LABELS = 100_000


def require_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels of a task. Raises `ConfigError` unless they are two or more different texts."""
    require(not isinstance(labels, str), "labels must be a list of texts, not one text")
    require(all(isinstance(label, str) and label for label in labels), "labels must be texts that are not empty")
    require(2 <= len(labels) <= MAX_LABELS, f"there must be from 2 to {MAX_LABELS:,} labels, got {len(labels)}")
    require(len(set(labels)) == len(labels), "a label is given twice")
    return tuple(labels)


def require_num_return(num_return: int, choices: int, what: str) -> None:
    """Raises `ConfigError` for more results than there are choices, or for none."""
    require(1 <= num_return <= choices, f"num_return must be from 1 to the {choices} {what}, got {num_return}")


def require_options(task: Task, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises `ConfigError` for options that a task does not have."""
    unknown = ", ".join(sorted(options.keys() - set(known)))
    require(not unknown, f"{task.name} has no option {unknown}; it has: {', '.join(known) or 'none'}")


def require_text(text: str, what: str = "the text") -> None:
    """Raises `ConfigError` for a text that is empty or not UTF-8."""
    from mplug2_fast.text import is_text

    require(is_text(text), f"{what} has characters that are not UTF-8")
    require(bool(text.strip()), f"{what} is empty")


def require_text_or_caption(item: Item, name: str) -> None:
    """Raises `DataError` for an item without texts, which the task of this name needs."""
    if not (item.text or item.caption):
        raise DataError(f"the item {printable(item.id)} has no text and no caption, which {name} needs")


def require_positions(model: Any, what: str, ids: Tensor) -> None:
    """Raises `ConfigError` for ids `(texts, tokens)` with more tokens than the model reads."""
    positions = model.config.text.max_position_embeddings
    require(ids.shape[1] <= positions, f"{what} has {ids.shape[1]} tokens, and the model reads at most {positions}")


def best_labels(probabilities: Tensor, labels: Sequence[str], count: int) -> list[Texts]:
    """The `count` most likely labels of each row of `probabilities` `(B, classes)`."""
    top = probabilities.float().topk(min(count, len(labels)), dim=1)
    rows = zip(top.indices.tolist(), top.values.tolist(), probabilities.isfinite().all(dim=1).tolist(), strict=True)
    return [
        [Alternative(labels[i], p) for i, p in zip(indices, values, strict=True)]
        if finite
        else not_finite(probabilities.dtype)
        for indices, values, finite in rows
    ]


def not_finite(dtype: torch.dtype) -> NotFiniteError:
    """The error for results of a model of `dtype` that are NaN or infinite."""
    remedies = {
        torch.float16: "float16 overflows for this video; use the dtype bfloat16 or float32",
        torch.bfloat16: "use the dtype float32, or a checkpoint whose training did not diverge",
    }
    remedy = remedies.get(dtype, "use a checkpoint whose training did not diverge")
    return NotFiniteError(f"the model's results are not finite (NaN or infinite): {remedy}")
