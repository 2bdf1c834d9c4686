"""Samples and batches. The samples of a step depend only on the seed and the number of the step, not on workers, ranks
or restarts. So the position in the data needs no saving."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mplug2_fast.datasets import Item, read_items
from mplug2_fast.errors import ConfigError, DataError, VideoError, printable
from mplug2_fast.images import GroundingAugment, ImageAugment, load_image
from mplug2_fast.images.transforms import normalise_in_square
from mplug2_fast.imports import imported
from mplug2_fast.ops.preprocess_frames import MEAN, STD, preprocess_frames
from mplug2_fast.tasks import Task
from mplug2_fast.training.augment import AUGMENTATIONS, PICTURE_AUGMENTATIONS
from mplug2_fast.video.indices import frame_indices, random_frame_indices
from mplug2_fast.video.preparation import MPLUG2, Preparation

if TYPE_CHECKING:
    from mplug2_fast.text import Tokenizer
    from mplug2_fast.training.recipe import Source
    from mplug2_fast.video.reader import VideoReader

MAX_REPLACEMENTS = 20
"""Maximum samples to try in place of an unreadable one."""


class Sample(NamedTuple):
    """An item and its frames; None for an item without video or image.

    Frames are `(T, height, width, 3)`, uint8, to be normalised; or `(3, T, height, width)`, float32, normalised. The
    item's box is a box of these frames.
    """

    item: Item
    frames: np.ndarray | None


class Dataset(Protocol):
    """Samples by number. A recipe may name such a class. It is called with the configuration of the model."""

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """The sample, with what is random in it taken from `rng`. Raises `VideoError` for an unreadable file."""
        ...


class ItemDataset:
    """The items of a JSON Lines file.

    Args:
        items: each with the fields of all tasks.
        tasks: the first decides which samples an item gives in training.
        vision: num_frames and image_size.
        augment: name in `AUGMENTATIONS` or `PICTURE_AUGMENTATIONS`, or None for the frames and pixels of evaluation.
        split_targets: whether an item with several targets gives several samples.
        preparation: how files become the model's input.

    Raises:
        ConfigError: models with this preparation do not have the augmentation.
        DataError: an item lacks a field that a task or the augmentation needs.
    """

    def __init__(
        self,
        items: Sequence[Item],
        tasks: Sequence[Task],
        vision: Any,
        augment: str | None = "none",
        *,
        split_targets: bool = True,
        preparation: Preparation = MPLUG2,
    ) -> None:
        known = AUGMENTATIONS if preparation == MPLUG2 else {"none": None, **PICTURE_AUGMENTATIONS}
        if (augment or "none") not in known:
            raise ConfigError(f"no augmentation {augment!r} for this model: choose one of {', '.join(known)}")
        for task, item in itertools.product(tasks, items):
            task.require_fields(item)
        if augment in PICTURE_AUGMENTATIONS:
            _require_pictures(items, augment)
        self.items = list(items)
        self.samples = [each for item in items for each in (tasks[0].samples(item) if split_targets else [item])]
        self._vision = vision
        self._augment = augment
        self._preparation = preparation

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        item = self.samples[index]
        if len(item.media) < 2:
            return self._sample(item, rng)
        parts = [replace(item, video=None, image=path, images=()) for path in item.media]
        frames = [found for part in parts if (found := self._sample(part, rng).frames) is not None]
        return Sample(item, np.concatenate(frames, axis=0 if frames[0].dtype == np.uint8 else 1))

    def _sample(self, item: Item, rng: np.random.Generator) -> Sample:
        if not item.media:
            return Sample(item, None)
        if self._preparation != MPLUG2:
            return self._prepared(item, rng)
        size, augment = self._vision.image_size, AUGMENTATIONS[self._augment or "none"]
        frames = _frames(item, self._vision.num_frames, augment.decoded_size(size), rng if self._augment else None)
        return Sample(item, augment(frames, size, rng))

    def _prepared(self, item: Item, rng: np.random.Generator) -> Sample:
        size, augment = self._vision.image_size, PICTURE_AUGMENTATIONS.get(self._augment or "none")
        if augment is None:
            frames, (width, height) = _prepared_frames(item, self._preparation, self._vision)
            if item.box is not None:
                item = replace(item, box=self._preparation.box_in_square(item.box, width, height))
            return Sample(item, frames)
        pixels = load_image(item.media[0]).pixels
        if isinstance(augment, ImageAugment):
            return Sample(item, augment(pixels, size, rng)[None])
        assert item.text is not None  # these were checked before
        assert item.box is not None
        found = augment(pixels, item.text, item.box, size, rng)
        frames = normalise_in_square(torch.from_numpy(found.pixels)[None], found.place, MEAN, STD).numpy()
        return Sample(replace(item, text=found.phrase, box=found.box), frames)


def _require_pictures(items: Sequence[Item], augment: str) -> None:
    for item in items:
        grounds = isinstance(PICTURE_AUGMENTATIONS[augment], GroundingAugment)
        if item.image is None or (grounds and (item.text is None or item.box is None)):
            needed = "an image, a text and a box" if grounds else "an image"
            raise DataError(f"the augmentation {augment} needs {needed}, which the item {printable(item.id)} lacks")


def _prepared_frames(item: Item, preparation: Preparation, vision: Any) -> tuple[np.ndarray, tuple[int, int]]:
    """Frames `(3, T, size, size)`, float32, and their width and height in the file."""
    from mplug2_fast.video.frames import prepare_clip
    from mplug2_fast.video.reader import VideoReader

    path, size = item.media[0], vision.image_size
    count = vision.num_frames if item.video is not None else 1
    if item.start is None and item.end is None:
        clip = prepare_clip(path, preparation, count, size)
        return clip.video.numpy(), clip.size
    resampling = preparation.resampling(total=2)  # a part is one of a video
    sizes = {} if resampling is None else {"image_size": size, "resampling": resampling}
    with VideoReader(path, threads=1, **sizes) as reader:
        first, total = _part(item, reader)
        frames = reader.frames([first + index for index in preparation.frames(total, count)])
        if resampling is None:
            frames = torch.from_numpy(np.stack([preparation.square(frame, size) for frame in frames.numpy()]))
        height, width = reader.size
    return preparation.tensor(frames, torch.float32, (width, height)).numpy(), (width, height)


def _part(item: Item, reader: VideoReader) -> tuple[int, int]:
    """The first frame of an item's part of a video, and the number of its frames."""
    if item.start is None and item.end is None:
        return 0, reader.num_frames
    end = reader.duration if item.end is None else min(item.end, reader.duration)
    first, final = reader.indices_at([min(item.start or 0.0, end), end])
    return first, final + 1 - first


def _frames(item: Item, count: int, size: int | None, rng: np.random.Generator | None) -> np.ndarray:
    from mplug2_fast.video.reader import VideoReader

    path = item.media[0]
    try:
        with VideoReader(path, image_size=size, threads=1) as reader:
            first, total = _part(item, reader)
            count = count if item.video is not None else 1
            chosen = frame_indices(total, count) if rng is None else random_frame_indices(total, count, rng)
            return reader.frames([first + index for index in chosen]).numpy()
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror or error}") from error


def open_dataset(source: Source, tasks: Sequence[Task], config: Any) -> Dataset:
    """The data of a source: a JSON Lines file, a folder of splits, or a class in Python.

    Raises:
        DataError: the file is not such data, or lacks fields of a task. ConfigError: the class cannot be imported.
    """
    where, colon, name = source.data.rpartition(":")
    if colon and name.isidentifier():
        return imported(where, name, "data")(config)
    items = read_items(source.data, source.split or None)
    # The reward of a caption takes all captions of its item.
    split = source.objective == "loss"
    preparation = tasks[0].preparation(config)
    return ItemDataset(items, tasks, config.vision, source.augment, split_targets=split, preparation=preparation)


class Batch(NamedTuple):
    """A part of a step's batch of one source.

    Attributes:
        tensors: task -> the inputs of its loss.
        targets: task -> the number of targets that its loss is the mean of.
        items: of the samples.
    """

    tensors: dict[str, dict[str, Tensor]]
    targets: dict[str, int]
    items: list[Item]


class Step(NamedTuple):
    """One rank's share of a step's batch: its parts, and the unreadable files with their reasons."""

    parts: list[Batch]
    bad: dict[str, str]


class StepDataset(torch.utils.data.Dataset[Step]):
    """One rank's share of each step's batch, by the number of the step among those of its source.

    Args:
        dataset: the samples.
        tasks: of the batch.
        tokenizer, config: of the model.
        batch_size: of all ranks together. parts: of a rank's share.
        seed: decides, with the step, the samples and their random changes.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        dataset: Dataset,
        tasks: Sequence[Task],
        tokenizer: Tokenizer,
        config: Any,
        *,
        batch_size: int,
        parts: int = 1,
        seed: Sequence[int] = (0,),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(dataset) < 1:
            raise DataError("a source has no samples")
        self._dataset, self._tasks, self._tokenizer, self._config = dataset, tasks, tokenizer, config
        self._batch_size, self._parts, self._seed = batch_size, parts, tuple(seed)
        self._rank, self._world_size = rank, world_size
        self._order = functools.lru_cache(2)(self._shuffled)

    def __getitem__(self, step: int) -> Step:
        positions = range(step * self._batch_size, (step + 1) * self._batch_size)[self._rank :: self._world_size]
        bad: dict[str, str] = {}
        samples = [self._sample(position, bad) for position in positions]
        size = len(samples) // self._parts
        parts = [self._batch(samples[start : start + size]) for start in range(0, len(samples), size)]
        return Step(parts, bad)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((*self._seed, epoch)).permutation(len(self._dataset))

    def _sample(self, position: int, bad: dict[str, str]) -> Sample:
        epoch, place = divmod(position, len(self._dataset))
        index = int(self._order(epoch)[place])
        rng = np.random.default_rng((*self._seed, epoch, index))
        for _ in range(MAX_REPLACEMENTS):
            try:
                return self._dataset.sample(index, rng)
            except VideoError as error:
                path, _, reason = str(error).partition(": ")
                bad[path] = reason
                index = int(rng.integers(len(self._dataset)))
        raise DataError(f"{MAX_REPLACEMENTS} files in a row cannot be read, the last one {path}: {reason}")

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        items = [sample.item for sample in samples]
        shared = {} if samples[0].frames is None else {"video": video_of(samples, self._config.vision.image_size)}
        tensors = {task.name: {**shared, **task.batch(items, self._tokenizer, self._config)} for task in self._tasks}
        targets = {task.name: task.targets(tensors[task.name], self._config) for task in self._tasks}
        return Batch(tensors, targets, items)


def video_of(samples: Sequence[Sample], image_size: int) -> Tensor:
    """The frames of samples as `(B, 3, T, image_size, image_size)`, float32, normalised."""
    frames = [torch.from_numpy(sample.frames) for sample in samples]
    return torch.stack([f if f.is_floating_point() else preprocess_frames(f, image_size) for f in frames])


class _Steps:
    """The numbers of the steps from `start` on."""

    def __init__(self, start: int, stop: int) -> None:
        self._steps = range(start, stop)

    def __iter__(self) -> Iterator[int]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)


def iterate(steps: StepDataset, start: int, stop: int, workers: int) -> Iterator[Step]:
    """The shares of the steps from `start` to `stop`, prepared ahead by worker processes if there are any."""
    options: dict[str, Any] = {"prefetch_factor": 2} if workers else {}
    yield from DataLoader(steps, batch_size=None, sampler=_Steps(start, stop), num_workers=workers, **options)


def schedule(shares: Sequence[float], steps: int, seed: int) -> np.ndarray:
    """The source of each step, drawn by the sources' shares."""
    p = np.asarray(shares) / sum(shares)
    return np.random.default_rng((seed, 7)).choice(len(p), size=steps, p=p)


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on the device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
