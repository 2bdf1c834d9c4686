"""Compares a model in two dtypes: its results, and the error of each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mplug2_fast.datasets import Item
from mplug2_fast.errors import ConfigError, DataError, NotFiniteError
from mplug2_fast.models.eight_bit import blocks_of
from mplug2_fast.predict import Predictor

MAX_KEPT = 5
"""Most blocks that a comparison recommends to keep wide."""


@dataclass(frozen=True)
class BlockError:
    """The relative error of a block's output: the norm of the difference, over that of the reference.

    Attributes:
        name: of the module.
        alone: with the reference's input.
        together: in the whole model, with the errors of the blocks before it.
        share: of the sum of all blocks' squared errors, `alone`.
    """

    name: str
    alone: float
    together: float
    share: float


@dataclass(frozen=True)
class Difference:
    """A file with two different results."""

    path: str
    reference: str
    found: str


@dataclass(frozen=True)
class PrecisionComparison:
    """How far the results in a dtype are from those in another one.

    Attributes:
        task, dtype, against: what was compared. files: how many were.
        agreement: the share of files with the same best result.
        mean_score_difference, max_score_difference: absolute, of the best results' scores.
        visual_error: relative error of the tokens of the files. logits_error: of the logits of the reference's results;
            None for tasks that do not generate text.
        blocks: in the order of the model. differences: files with other results.
        keep: the blocks that contribute most: half of all squared errors, or the most that are recommended.
    """

    task: str
    dtype: str
    against: str
    files: int
    agreement: float
    mean_score_difference: float
    max_score_difference: float
    visual_error: float
    logits_error: float | None
    blocks: tuple[BlockError, ...]
    differences: tuple[Difference, ...]
    keep: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Nested plain values."""
        return asdict(self)


class _Sums:
    """Squared norms of differences and of references, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, found: Tensor, reference: Tensor) -> None:
        difference, size = self.sums.get(name, (0.0, 0.0))
        wide = reference.detach().float()
        apart = (found.detach().float() - wide).square().sum().item()
        self.sums[name] = difference + apart, size + wide.square().sum().item()

    def relative(self, name: str) -> float:
        difference, size = self.sums.get(name, (0.0, 0.0))
        return (difference / size) ** 0.5 if size else 0.0


@torch.inference_mode()
def compare_dtypes(
    reference: Predictor, other: Predictor, files: Sequence[str], text: str | None = None
) -> PrecisionComparison:
    """Compares two predictors of one checkpoint in different dtypes.

    Args:
        reference: the more exact one. other: the one to judge.
        files: videos or images. text: for each file, such as a question.

    Raises:
        ConfigError: no files, or the task does not take them, or not this text. DataError: a file cannot be read.
        NotFiniteError: a model overflows.
    """
    if not files or not reference.task.reads_files:
        raise ConfigError("a comparison needs files, and a task that takes them")
    reference.check_text(text)
    alone, together, ends = _Sums(), _Sums(), _Sums()
    texts, scores = [], []
    for decoded in reference.decoded(files, 0, 60.0, in_order=True):
        if decoded.video is None:
            raise DataError(f"{decoded.path}: {decoded.error}")
        best = [_best(predictor, decoded.video, text) for predictor in (reference, other)]
        texts.append((decoded.path, *(each.text for each in best)))
        scores.append(abs(best[0].score - best[1].score))
        passes = [_Pass(predictor, decoded.video, text, best[0].text) for predictor in (reference, other)]
        outputs: dict[str, list[Tensor]] = {}
        with _watching(reference, _alone(other, alone, outputs)):
            expected = passes[0].run()
        with _watching(other, _together(together, outputs)):
            found = passes[1].run()
        for name, value in expected.items():
            ends.add(name, found[name], value)
    names = [block.name for block in blocks_of(reference.model)]
    squares = {name: alone.relative(name) ** 2 for name in names}
    total = sum(squares.values()) or 1.0
    blocks = [BlockError(name, squares[name] ** 0.5, together.relative(name), squares[name] / total) for name in names]
    return PrecisionComparison(
        task=reference.task.name,
        dtype=other.model.precision,
        against=reference.model.precision,
        files=len(texts),
        agreement=sum(one == another for _, one, another in texts) / len(texts),
        mean_score_difference=sum(scores) / len(scores),
        max_score_difference=max(scores),
        visual_error=ends.relative("visual"),
        logits_error=ends.relative("logits") if "logits" in ends.sums else None,
        blocks=tuple(blocks),
        differences=tuple(Difference(*each) for each in texts if each[1] != each[2]),
        keep=_most_of(blocks),
    )


def _most_of(blocks: Sequence[BlockError]) -> tuple[str, ...]:
    kept: list[str] = []
    rest = 1.0
    for block in sorted(blocks, key=lambda block: -block.share)[:MAX_KEPT]:
        if rest <= 0.5 or block.share == 0:
            break
        kept.append(block.name)
        rest -= block.share
    return tuple(kept)


def _best(predictor: Predictor, video: Tensor, text: str | None) -> Any:
    embeds, _ = predictor.encode(video)
    (found,) = predictor.responder(**predictor.complete_options())(embeds, [text])
    if isinstance(found, NotFiniteError):
        raise found
    return found[0]


@dataclass(frozen=True)
class _Pass:
    """One pass of a model over a file, a text and a result that both models are given."""

    predictor: Predictor
    video: Tensor
    text: str | None
    result: str

    def run(self) -> dict[str, Tensor]:
        predictor, task = self.predictor, self.predictor.task
        embeds, _ = predictor.encode(self.video)
        if not task.soft_targets:  # it generates no text
            predictor.responder(**predictor.complete_options())(embeds, [self.text])
            return {"visual": embeds}
        item = Item("", caption=(self.result,), question=self.text, answers={self.result: 1.0})
        batch = task.batch([item], predictor.tokenizer, predictor.model.config)
        batch = {name: tensor.to(embeds.device) for name, tensor in batch.items()}
        return {"visual": embeds, "logits": task.logits(predictor.model, {**batch, "image_embeds": embeds})}


Watch = Callable[[str, tuple[Any, ...], dict[str, Any], Tensor], None]
"""Takes the name of a block, the arguments of its call, and its output."""


@contextmanager
def _watching(predictor: Predictor, watch: Watch) -> Iterator[None]:
    """Calls `watch` after each call of a block."""
    with ExitStack() as stack:
        for block in blocks_of(predictor.model):

            def hook(_: Any, arguments: Any, options: Any, output: Tensor, name: str = block.name) -> None:
                watch(name, arguments, options, output)

            stack.callback(block.module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _alone(other: Predictor, sums: _Sums, outputs: dict[str, list[Tensor]]) -> Watch:
    """Calls the other model's block with the input of the reference's, whose outputs are kept."""
    blocks = {block.name: block.module for block in blocks_of(other.model)}

    def watch(name: str, arguments: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> None:
        block = blocks[name]
        like = next(block.parameters())
        cast = [_like(each, like) for each in arguments]
        sums.add(name, block(*cast, **{key: _like(each, like) for key, each in options.items()}), output)
        outputs.setdefault(name, []).append(output)

    return watch


def _together(sums: _Sums, outputs: dict[str, list[Tensor]]) -> Watch:
    """Compares with the reference's outputs, in the order of the calls."""

    def watch(name: str, _: tuple[Any, ...], __: dict[str, Any], output: Tensor) -> None:
        reference = outputs[name].pop(0)
        if reference.shape == output.shape:
            sums.add(name, output, reference)

    return watch


def _like(value: Any, like: Tensor) -> Any:
    return value.to(like) if isinstance(value, Tensor) and value.is_floating_point() else value
