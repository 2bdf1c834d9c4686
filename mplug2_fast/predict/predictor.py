"""From files to results, for any task. The next file is decoded while the model computes."""

from __future__ import annotations

import copy
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mplug2_fast.checkpoint import from_pretrained, vocabulary_path
from mplug2_fast.errors import CheckpointError, MPlug2Error, NotFiniteError
from mplug2_fast.predict.memory import clip_bytes, is_out_of_memory, require_memory
from mplug2_fast.tasks import TASKS, Alternative, Respond, Task, Texts, get
from mplug2_fast.tasks.base import require
from mplug2_fast.tasks.generative import text_options
from mplug2_fast.text import Tokenizer, clean_question
from mplug2_fast.video import DecodePool
from mplug2_fast.video.frames import prepare_clip
from mplug2_fast.video.limits import Guard, Limits
from mplug2_fast.video.preparation import Box

if TYPE_CHECKING:
    from typing_extensions import Self

    from mplug2_fast.video import Clip, Preparation

TINY_MODEL = Path(__file__).parents[1] / "data" / "tiny"
"""The mPLUG-2 that comes with the package. It knows the clips of examples/moving_shapes and nothing else."""

TINY_MPLUG = TINY_MODEL.with_name("tiny_mplug")
"""The mPLUG that comes with the package. It knows the pictures of examples/shapes and nothing else."""

TINY_MPLUG_TASKS = frozenset(("grounding", "retrieval"))

PathLike = str | os.PathLike[str]
Paths = PathLike | Iterable[PathLike]


@dataclass(frozen=True)
class Result:
    """The result for one file: a text, or an error.

    Attributes:
        path: the file. For a task on texts alone, the input text.
        score: the length-normalised log-probability of a generated text, or the probability of a candidate or label.
        alternatives: the `num_return` best, best first, including `text`. Their boxes are (center x, center y, width,
            height) in [0, 1] of what the model sees.
        frames: the indices of the frames that the model saw. decoder: the library that decoded them.
        seconds: the wall time of each stage: `decode` (file to pixels), `encode` (pixels to visual tokens) and
            `generate` (tokens to text).
        size: width and height of the upright file.
        box: (left, top, right, bottom) in pixels of the upright file, for tasks that find boxes.
    """

    path: str
    text: str | None = None
    score: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    frames: tuple[int, ...] = ()
    decoder: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    size: tuple[int, int] | None = None
    box: Box | None = None


class Decoded(NamedTuple):
    """A decoded file: its video `(1, 3, T, H, W)` or the error, the seconds that decoding took, the indices of the
    frames, the decoder, and the size of the frames in the file."""

    path: str
    video: Tensor | None
    seconds: float
    error: str | None
    frames: tuple[int, ...] = ()
    decoder: str | None = None
    size: tuple[int, int] | None = None


Words = Callable[[Any], list[Texts]]
"""From image_embeds `(B, S, D)` to the results of each of the B videos."""

TEXT_BATCH = 32
"""Texts per batch, for tasks on texts alone."""


class Predictor:
    """Applies a model, its tokenizer and one of its tasks to files.

    Attributes:
        model, tokenizer: as given or loaded. task: the task.
    """

    command: ClassVar[str] = "predict"
    """Its name in the settings of a bulk run."""
    default_task: ClassVar[str | None] = None

    def __init__(
        self,
        checkpoint: PathLike | torch.nn.Module | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        task: Task | str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        """Loads a checkpoint in any format that `mplug2_fast.from_pretrained` reads, or takes a model.

        Args:
            checkpoint: the checkpoint, or a model; None is the tiny model of the package for the task. A `vocab.txt` in
                a directory is the vocabulary, otherwise it is that of bert-base-uncased.
            tokenizer: the one that the model was trained with. Only with a model.
            task: a name in `mplug2_fast.tasks.TASKS`, or a task; None is the first task that the checkpoint names.
            dtype: a dtype or its name; None or "auto": see `pick_dtype`. "int8": 8-bit weights, see `from_pretrained`.
                Not with a model.
            keep: with 8-bit weights, patterns of layers that are not rounded: see `Model.quantise`.
            device: a device or its name; None or "auto": see `pick_device`. Not with a model.

        Raises:
            CheckpointError: the checkpoint cannot be read, or does not serve the task.
            ConfigError: an unknown device or dtype, a vocabulary that does not fit the model, or arguments that exclude
                each other.
        """
        task = task or self.default_task
        if isinstance(checkpoint, torch.nn.Module):
            require(tokenizer is not None, "a model needs a tokenizer: pass the one that it was trained with")
            require(dtype is None and device is None and not keep, "a model has its dtype and device: convert it first")
            self.model, self.tokenizer = checkpoint, tokenizer
        else:
            require(tokenizer is None, "a checkpoint has its own vocabulary: pass a tokenizer only with a model")
            self.model, self.tokenizer = _load(checkpoint, task, dtype, device, keep)
        if task is None:
            self.task = next(iter(self.model.tasks.values()))
        elif isinstance(task, str) and task not in TASKS and task in self.model.tasks:
            self.task = self.model.tasks[task]
        else:
            self.task = get(task)

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        keep: Sequence[str] = (),
    ) -> Self:
        """Makes a predictor from the path of a checkpoint."""
        return cls(path, dtype=dtype, device=device, keep=keep)

    @property
    def preparation(self) -> Preparation:
        """How files become the model's input."""
        return self.task.preparation(self.model.config)

    def for_task(self, task: Task | str) -> Self:
        """The same model and tokenizer for another task. Adds the task to the model if it lacks it."""
        other = copy.copy(self)
        other.task = get(task)
        if other.task.name not in other.model.tasks:
            other.model.add_task(other.task)
        return other

    def with_options(self, **options: Any) -> tuple[Predictor, dict[str, Any]]:
        """The predictor for these options, and the options of its task."""
        return self, options

    def predict(
        self,
        paths: Paths,
        text: str | None = None,
        *,
        num_workers: int = 0,
        timeout: float | None = 60.0,
        **options: Any,
    ) -> Iterator[Result]:
        """Yields one `Result` per file as soon as it is ready, in order unless several processes decode.

        Args:
            paths: one file or several; an image is a video of one frame.
            text: the text for each file, such as a question. Only for tasks that read text.
            num_workers: decoding processes. A file that crashes its decoder then affects no other file. 0 decodes in a
                thread.
            timeout: decode timeout per file in seconds; None for no limit.
            options: of the task, such as num_beams, num_return, min_length and max_length of beam search.

        Raises:
            ConfigError: options that contradict each other or the model, or a text that the model cannot read.
            MPlug2Error: the device ran out of memory.
        """
        require(self.task.reads_files, f"{self.task.name} takes texts alone: use predict_texts")
        self.check_text(text)
        respond = self.responder(**self.complete_options(**options))
        return self.run(paths, lambda embeds: respond(embeds, [text] * len(embeds)), num_workers, timeout)

    def predict_texts(self, texts: Sequence[str], **options: Any) -> Iterator[Result]:
        """Yields one `Result` per text, in order, for a task on texts alone.

        Raises:
            ConfigError: as for `predict`, or the task needs files. MPlug2Error: the device ran out of memory.
        """
        require(not self.task.reads_files, f"{self.task.name} needs an image or a video: use predict")
        for text in texts:
            self.check_text(text)
        respond = self.responder(**self.complete_options(**options))
        return self._respond_to(respond, texts)

    def _respond_to(self, respond: Respond, texts: Sequence[str]) -> Iterator[Result]:
        for start in range(0, len(texts), TEXT_BATCH):
            some = texts[start : start + TEXT_BATCH]
            try:
                found, seconds = self.say(None, lambda nothing, some=some: respond(nothing, some))
            except (RuntimeError, MemoryError) as problem:
                self.explain_memory(problem)
                raise
            for text, each in zip(some, found, strict=True):
                taken = {"generate": seconds / len(some)}
                if isinstance(each, NotFiniteError):
                    yield Result(text, seconds=taken, error=str(each))
                else:
                    yield Result(text, *each[0], tuple(each), seconds=taken)

    def complete_options(self, **options: Any) -> dict[str, Any]:
        """All options of the task, with defaults filled in.

        Raises `ConfigError` for an option that the task does not have, for options that contradict each other or the
        model, and for a search that needs more memory than the device has.
        """
        unknown = options.keys() - set(self.task.options)
        known = ", ".join(self.task.options) or "none"
        require(not unknown, f"{self.task.name} has no option {', '.join(sorted(unknown))}; it has: {known}")
        return self.generation_options(**options) if "num_beams" in self.task.options else options

    def responder(self, **options: Any) -> Respond:
        """The function from image_embeds and texts to results. Raises `ConfigError` for bad options."""
        return self.task.respond(self.model, self.tokenizer, **options)

    def check_text(self, text: str | None) -> None:
        """Raises `ConfigError` if the task does not read text, or the model cannot read this one."""
        require(self.task.reads_text or text is None, f"{self.task.name} reads no text")
        if self.task.reads_text:
            require(text is not None, f"{self.task.name} needs a text")
            self.task.check_text(self.model, self.tokenizer, str(text))

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that are not in the model's vocabulary. They look alike to the model."""
        return self.tokenizer.unknown_words(clean_question(text))

    def run(self, paths: Paths, words: Words, num_workers: int = 0, timeout: float | None = 60.0) -> Iterator[Result]:
        """Yields one `Result` per path: see `predict`."""
        decoded = self.decoded(paths, num_workers, timeout)
        for path, video, decoding, error, frames, decoder, size in decoded:
            if video is None:
                yield Result(path, seconds={"decode": decoding}, error=error)
            else:
                try:
                    image_embeds, encoding = self.encode(video)
                    (found,), generating = self.say(image_embeds, words)
                except (RuntimeError, MemoryError) as problem:
                    self.explain_memory(problem)
                    raise
                seconds = {"decode": decoding, "encode": encoding, "generate": generating}
                if isinstance(found, NotFiniteError):
                    yield Result(path, frames=frames, decoder=decoder, seconds=seconds, error=str(found), size=size)
                    continue
                seen = found[0].box
                box = None if seen is None or size is None else self.preparation.box_in_pixels(seen, *size)
                yield Result(path, *found[0], tuple(found), frames, decoder, seconds, size=size, box=box)

    def explain_memory(self, problem: Exception) -> None:
        """Raises `MPlug2Error` if the problem is that the device ran out of memory."""
        if is_out_of_memory(problem):
            device = next(self.model.parameters()).device
            remedy = "use a smaller dtype, fewer beams, or the CPU"
            raise MPlug2Error(f"{device} ran out of memory: {remedy}") from problem

    @torch.inference_mode()
    def encode(self, videos: Tensor) -> tuple[Tensor, float]:
        """Image_embeds `(B, S, D)` of videos `(B, 3, T, H, W)`, and the seconds that it took.

        Several views `(B, views, 3, T, H, W)` give `(B, views, S, D)`.
        """
        weights = next(self.model.parameters())
        started = time.perf_counter()
        image_embeds = self.task.encode(self.model, videos.flatten(0, -5).to(weights.device, weights.dtype))
        image_embeds = image_embeds.unflatten(0, videos.shape[:-4])
        if weights.is_cuda:
            torch.cuda.synchronize(weights.device)
        return image_embeds, time.perf_counter() - started

    @torch.inference_mode()
    def say(self, image_embeds: Tensor | None, words: Words) -> tuple[list[Texts], float]:
        """The results of `words` for image_embeds `(B, S, D)`, and the seconds that it took."""
        started = time.perf_counter()
        found = words(image_embeds)
        return found, time.perf_counter() - started

    def decoded(
        self,
        paths: Paths,
        num_workers: int,
        timeout: float | None,
        *,
        num_frames: int | None = None,
        in_order: bool = False,
    ) -> Iterator[Decoded]:
        """Yields the decoded files, in order if `in_order` is set or one process or thread decodes.

        Args:
            num_frames: of a video; None is the model's number.
        """
        files, num_frames = _each(paths), num_frames or self.model.config.vision.num_frames
        if not num_workers:
            return self._decoded(files, timeout, num_frames)
        return self._decoded_by_workers(files, num_workers, timeout, num_frames, in_order or num_workers == 1)

    def _decoded(self, paths: Iterable[PathLike], timeout: float | None, num_frames: int) -> Iterator[Decoded]:
        """Yields the files in order. A thread decodes the next file meanwhile."""
        pending: deque[Future[Decoded]] = deque()
        guard = Guard(Limits(seconds=timeout))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as pool:
            try:
                for path in paths:
                    pending.append(pool.submit(self._decode, os.fspath(path), guard, num_frames))
                    if len(pending) > 1:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:  # on Ctrl-C, do not wait until files are decoded
                guard.cancel()

    def _decode(self, path: str, guard: Guard, num_frames: int) -> Decoded:
        started = time.perf_counter()
        guard.restart()
        try:
            clip = prepare_clip(path, self.preparation, num_frames, self.model.config.vision.image_size, guard)
        except (MPlug2Error, OSError, ValueError, RuntimeError, MemoryError) as problem:
            return Decoded(path, None, time.perf_counter() - started, _reason(problem, path))
        seconds = time.perf_counter() - started
        return Decoded(path, clip.video[None], seconds, None, tuple(clip.indices), clip.decoder, clip.size)

    def _decoded_by_workers(
        self, paths: Iterable[PathLike], num_workers: int, timeout: float | None, num_frames: int, in_order: bool
    ) -> Iterator[Decoded]:
        """Yields the files as soon as a worker process has decoded them."""
        if isinstance(paths, Sized):
            num_workers = min(num_workers, max(len(paths), 1))
        dtype = next(self.model.parameters()).dtype
        sizes = {"num_frames": num_frames, "image_size": self.model.config.vision.image_size}
        with DecodePool(num_workers, timeout=timeout, dtype=dtype, preparation=self.preparation, **sizes) as pool:
            clips = pool.clips(os.fspath(path) for path in paths)
            for clip in _in_order(clips) if in_order else clips:
                video = None if clip.frames is None else clip.frames[None]
                error = None if clip.error is None else _reason(clip.error, clip.source)
                yield Decoded(clip.source, video, clip.seconds, error, tuple(clip.indices), clip.backend, clip.size)

    def generation_options(
        self,
        num_beams: int | None = None,
        num_return: int = 1,
        min_length: int | None = None,
        max_length: int | None = None,
    ) -> dict[str, int]:
        """All options of beam search, with defaults. Raises `ConfigError` for bad ones and for too little memory."""
        options = {"num_beams": num_beams, "num_return": num_return, "min_length": min_length, "max_length": max_length}
        filled = text_options(self.task, self.model, **options)
        weights, config = next(self.model.parameters()), self.model.config
        sizes = {"num_frames": config.vision.num_frames, "itemsize": weights.itemsize}
        beams, longest = filled["num_beams"], filled["max_length"]
        needed = clip_bytes(config, num_beams=beams, max_length=longest, **sizes)
        require_memory(f"num_beams {beams:,}", needed, weights.device)
        return filled


def tiny_model(task: Task | str | None) -> Path:
    """The package's tiny model for a task."""
    name = task.name if isinstance(task, Task) else task
    return TINY_MPLUG if name in TINY_MPLUG_TASKS else TINY_MODEL


def _load(
    path: PathLike | None,
    task: Task | str | None,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    keep: Sequence[str],
) -> tuple[torch.nn.Module, Tokenizer]:
    """The model of a checkpoint and its tokenizer."""
    if path is None:
        path = tiny_model(task)
        if not path.exists():
            raise CheckpointError(f"{path}: the tiny model is missing: reinstall mplug2-fast, or name a checkpoint")
    path = Path(path)
    model = from_pretrained(path, task=task, dtype=dtype or "auto", device=device or "auto", keep=keep)
    return model, Tokenizer.from_vocab(vocabulary_path(path), vocab_size=model.config.text.vocab_size)


def _in_order(clips: Iterable[Clip]) -> Iterator[Clip]:
    early: dict[int, Clip] = {}
    index = 0
    for clip in clips:
        early[clip.index] = clip
        while index in early:
            yield early.pop(index)
            index += 1


def _each(paths: Paths) -> Iterable[PathLike]:
    return [paths] if isinstance(paths, (str, os.PathLike)) else paths


def _reason(problem: Exception, path: str) -> str:
    """The message of an error, on one line and without the path."""
    return _one_line(str(problem) or type(problem).__name__).removeprefix(f"{_one_line(path)}: ")


def _one_line(text: str) -> str:
    return " ".join(text.split())
