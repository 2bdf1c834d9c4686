"""The loop over files that both tasks share: decode one ahead, encode, turn into words, report what is bad."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from mplug2_fast.checkpoint import from_pretrained, vocabulary_path
from mplug2_fast.config import Task
from mplug2_fast.devices import pick_device, pick_dtype
from mplug2_fast.errors import CheckpointError, ConfigError, MPlug2Error
from mplug2_fast.outputs import GenerationOutput
from mplug2_fast.text import Tokenizer
from mplug2_fast.video import load_video

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")

TINY_MODEL = Path(__file__).parents[1] / "data" / "tiny"
"""The model that ships: it knows the clips of examples/moving_shapes and nothing else."""

PathLike = str | os.PathLike[str]
Paths = PathLike | Iterable[PathLike]


class Alternative(NamedTuple):
    """One text for a file, and its score: see `Result`."""

    text: str
    score: float


@dataclass(frozen=True)
class Result:
    """What came out for one file: a text, or an error.

    `score` is the length-normalised log probability of a generated text, or the probability of a given candidate
    among the candidates. `alternatives` are the `num_return` best, best first, the text itself included.
    `seconds` has the wall time of each stage: `decode` (file to pixels), `encode` (pixels to visual tokens) and
    `generate` (tokens to words).
    """

    path: str
    text: str | None = None
    score: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None


class VideoTask:
    """A model, its tokenizer, and the loop over files that both tasks share."""

    task: ClassVar[Task]

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        """Use a model that is already there, with the tokenizer that it was trained with."""
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load a checkpoint of any form that `mplug2_fast.from_pretrained` reads.

        Args:
            path: the checkpoint; None takes the tiny model that ships. A `vocab.txt` in a directory is the vocabulary,
                otherwise it is that of bert-base-uncased.
            dtype: a dtype or its name; None or "auto": see `pick_dtype`.
            device: a device or its name; None or "auto": see `pick_device`.

        Raises:
            CheckpointError: the checkpoint cannot be read, or is not one of this task.
            ConfigError: no such device or dtype, or a vocabulary that does not fit the model.
        """
        device = pick_device(device)
        dtype = pick_dtype(dtype, device)
        if path is None and not TINY_MODEL.exists():
            raise CheckpointError(f"{TINY_MODEL}: the tiny model is not there: reinstall, or name a checkpoint")
        path = TINY_MODEL if path is None else Path(path)
        model = from_pretrained(path, task=cls.task, dtype=dtype, device=device)
        tokenizer = Tokenizer.from_vocab(vocabulary_path(path), vocab_size=model.config.text.vocab_size)
        return cls(model, tokenizer)

    def run(self, paths: Paths, words: Callable[[Tensor], list[Alternative]]) -> Iterator[Result]:
        """One `Result` a path, in order; `words` turns image_embeds `(1, S, D)` into texts, best first."""
        for path, decoded in _one_ahead(self._decode, _as_list(paths)):
            video, decoding, error = decoded.result()
            if video is None:
                yield Result(path, seconds={"decode": decoding}, error=error)
            else:
                found, encoding, generating = self._words(video, words)
                seconds = {"decode": decoding, "encode": encoding, "generate": generating}
                yield Result(path, *found[0], tuple(found), seconds)

    @torch.inference_mode()
    def _words(
        self, video: Tensor, words: Callable[[Tensor], list[Alternative]]
    ) -> tuple[list[Alternative], float, float]:
        """(texts, seconds of encoding, seconds of generating) of a video `(1, 3, T, H, W)`."""
        weights = next(self.model.parameters())
        started = time.perf_counter()
        try:
            image_embeds = self.model.encode_video(video.to(weights.device, weights.dtype))
            if weights.is_cuda:
                torch.cuda.synchronize(weights.device)
            encoded = time.perf_counter()
            found = words(image_embeds)
        except torch.OutOfMemoryError as error:
            raise MPlug2Error(
                f"{weights.device} ran out of memory: use a smaller dtype, fewer beams, or the CPU"
            ) from error
        return found, encoded - started, time.perf_counter() - encoded

    def _decode(self, path: str) -> tuple[Tensor | None, float, str | None]:
        """(video, seconds, None) of a good file, (None, seconds, reason) of a bad one."""
        started = time.perf_counter()
        vision = self.model.config.vision
        video, error = None, None
        try:
            video = load_video(path, num_frames=vision.num_frames, image_size=vision.image_size)[None]
        except (MPlug2Error, OSError, ValueError, RuntimeError, MemoryError) as problem:
            error = _one_line(str(problem) or type(problem).__name__).removeprefix(f"{_one_line(path)}: ")
        return video, time.perf_counter() - started, error

    def generation_options(
        self, num_beams: int | None, num_return: int, min_length: int | None, max_length: int | None
    ) -> dict[str, int]:
        """The options of `model.generate`, with the model's defaults filled in. Raises `ConfigError`."""
        defaults, positions = self.model.config.generation, self.model.config.text.max_position_embeddings
        shortest, longest = defaults.lengths(self.task)
        beams = defaults.num_beams if num_beams is None else num_beams
        shortest = shortest if min_length is None else min_length
        longest = longest if max_length is None else max_length
        require(beams >= 1, f"num_beams must be at least 1, got {beams}")
        require(1 <= num_return <= beams, f"num_return must be from 1 to num_beams, {beams}; got {num_return}")
        require(1 <= longest <= positions, f"max_length must be from 1 to {positions}, got {longest}")
        require(0 <= shortest <= longest, f"min_length must be from 0 to max_length, {longest}; got {shortest}")
        return {"num_beams": beams, "num_return": num_return, "min_length": shortest, "max_length": longest}

    def texts(self, output: GenerationOutput, prompt: str = "") -> list[Alternative]:
        """The hypotheses of a batch of one, without the rows that only pad."""
        rows = zip(output.sequences[0].tolist(), output.scores[0].tolist(), strict=True)
        return [Alternative(self.tokenizer.decode_caption(ids, prompt), score) for ids, score in rows if ids[0] >= 0]


def _one_ahead(work: Callable[[str], _T], paths: Sequence[PathLike]) -> Iterator[tuple[str, Future[_T]]]:
    """(path, future of `work(path)`) in order; while one is consumed, the next is worked on in a thread."""
    pending: deque[tuple[str, Future[_T]]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as pool:
        for path in paths:
            name = os.fspath(path)
            pending.append((name, pool.submit(work, name)))
            if len(pending) > 1:
                yield pending.popleft()
        yield from pending


def _as_list(paths: Paths) -> list[PathLike]:
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
