"""What a bulk run does with each batch, and the lines that it writes."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from mplug2_fast.bulk.journal import Journal, Line
from mplug2_fast.bulk.sources import Source
from mplug2_fast.errors import NotFiniteError
from mplug2_fast.predict.memory import clip_bytes
from mplug2_fast.tasks import Alternative
from mplug2_fast.video import Windows

if TYPE_CHECKING:
    from mplug2_fast.predict import Predictor
    from mplug2_fast.tasks import Texts
    from mplug2_fast.video import Clip

_T = TypeVar("_T")


@dataclass(frozen=True)
class Frames:
    """Which frames of a video make a clip: `count` spread over it, or windows over all of it."""

    count: int
    windows: Windows | None = None

    @property
    def length(self) -> int:
        """Frames of a clip."""
        return self.count if self.windows is None else self.windows.length

    def settings(self) -> dict[str, Any]:
        """For the settings of a journal."""
        if self.windows is None:
            return {"frames": self.count, "windows": None}
        return {"frames": None, "windows": [self.windows.length, self.windows.stride]}


@dataclass
class Finished(Generic[_T]):
    """A video of which everything is computed: what came of each clip, in their order, and the seconds it took."""

    video: Source
    outcomes: list[_T] = field(default_factory=list)
    indices: list[list[int]] = field(default_factory=list)
    backend: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, clip: Clip, outcome: _T, seconds: dict[str, float]) -> None:
        """One clip more."""
        self.outcomes.append(outcome)
        self.indices.append(clip.indices)
        self.backend = clip.backend
        for stage, taken in {"decode": clip.seconds, **seconds}.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + taken


class Work(ABC, Generic[_T]):
    """From batches of clips to lines.

    Args:
        predictor: the model and its task. frames: of a clip.
    """

    command: str
    guarded: bool = False
    """Whether other files depend on the journal: see `Journal`."""

    def __init__(self, predictor: Predictor, frames: Frames) -> None:
        self.predictor = predictor
        self.frames = frames

    @property
    def weights(self) -> Tensor:
        """One of the model's: it knows the device and the dtype."""
        return next(self.predictor.model.parameters())

    @property
    def image_size(self) -> int:
        return self.predictor.model.config.vision.image_size

    def settings(self) -> dict[str, Any]:
        """What the lines depend on, apart from the videos."""
        return {
            "command": self.command,
            "model": fingerprint(self.predictor.model),
            "dtype": str(self.weights.dtype).removeprefix("torch."),
            **self.frames.settings(),
        }

    def begin(self, rank: int) -> None:
        """Make ready to write, as one of several programs; called once, before anything is computed."""

    def write(self, lines: list[Line], journal: Journal) -> None:
        """Write lines, or keep them until `flush`."""
        journal.append(lines)

    def flush(self, journal: Journal) -> None:
        """Write everything that was kept."""

    def tidy(self, journal: Journal) -> None:
        """Remove what a killed run left behind; called before any `begin`, and for each part that is moved."""

    @abstractmethod
    def bytes_of_clip(self) -> int:
        """The memory that a clip takes in a batch."""

    @abstractmethod
    def compute(self, frames: Tensor, videos: Sequence[Source]) -> tuple[list[_T], dict[str, float]]:
        """What comes of each clip, and the seconds by stage that the batch took.

        Args:
            frames: `(B, 3, T, H, W)`, normalised, on the CPU. videos: those that the clips are of.

        Raises:
            torch.OutOfMemoryError: the batch is too large.
        """

    @abstractmethod
    def keys(self, video: Source) -> list[Hashable]:
        """The keys of the lines that a video gives."""

    @abstractmethod
    def key(self, line: Line) -> Hashable:
        """The key of a line.

        Raises:
            KeyError, TypeError, ValueError: it is none of this work's.
        """

    @abstractmethod
    def lines(self, finished: Finished[_T]) -> list[Line]:
        """The lines of a video. Those with a result that is not finite are errors."""

    @abstractmethod
    def no_lines(self, video: Source) -> list[Line]:
        """The lines of a video that has an error, without that."""

    def error_lines(self, video: Source, clip: Clip) -> list[Line]:
        """The lines of a video that could not be decoded."""
        reason = " ".join(str(clip.error).removeprefix(f"{video.path}: ").split())
        ending = {"frames": [], "decoder": None, "seconds": _rounded({"decode": clip.seconds}), "error": reason}
        if clip.transient:
            ending["transient"] = True
        return [{**line, **ending} for line in self.no_lines(video)]

    def _ending(self, finished: Finished[_T], error: NotFiniteError | None = None) -> Line:
        """The fields that the line of a computed video ends with."""
        indices = finished.indices if self.frames.windows is not None else finished.indices[0]
        return {
            "frames": indices,
            "decoder": finished.backend,
            "seconds": _rounded(finished.seconds),
            "error": None if error is None else str(error),
        }


class Predict(Work["list[Texts]"]):
    """Results of any task: one line per video, or one per question about a video, which is encoded once for all.

    Args:
        predictor: the model and its task. frames: of a clip.
        options: of the task. A run with other options does not go on with this one's file.
    """

    def __init__(self, predictor: Predictor, frames: Frames, options: dict[str, Any]) -> None:
        super().__init__(predictor, frames)
        self.command = predictor.command
        self._options = predictor.complete_options(**options)
        self._respond = predictor.responder(**self._options)

    def settings(self) -> dict[str, Any]:
        options = {
            name: _digest("\n".join(value).encode()) if name == "candidates" else value
            for name, value in self._options.items()
        }
        return {**super().settings(), "task": self.predictor.task.name, **options}

    def bytes_of_clip(self) -> int:
        options = {name: self._options.get(name) or 1 for name in ("num_beams", "max_length")}
        return clip_bytes(
            self.predictor.model.config, num_frames=self.frames.length, itemsize=self.weights.itemsize, **options
        )

    def compute(self, frames: Tensor, videos: Sequence[Source]) -> tuple[list[list[Texts]], dict[str, float]]:
        image_embeds, encoding = self.predictor.encode(frames)
        asked = [(clip, text) for clip, video in enumerate(videos) for text in _texts(video)]
        found: list[list[Texts]] = [[] for _ in videos]
        generating = 0.0
        for start in range(0, len(asked), len(videos)):  # as many at a time as there is memory for
            clips, texts = zip(*asked[start : start + len(videos)], strict=True)
            chosen = image_embeds[torch.tensor(clips, device=image_embeds.device)]
            results, seconds = self.predictor.say(chosen, lambda embeds, texts=texts: self._respond(embeds, texts))
            generating += seconds
            for clip, result in zip(clips, results, strict=True):
                found[clip].append(result)
        return found, {"encode": encoding, "generate": generating}

    def keys(self, video: Source) -> list[Hashable]:
        return [self.key(head) for head in _heads(video)]

    def key(self, line: Line) -> Hashable:
        path = text_in(line, "path")
        return (path, text_in(line, "question"), line.get("id")) if self.predictor.task.reads_text else path

    def lines(self, finished: Finished[list[Texts]]) -> list[Line]:
        return [
            {**head, **self._fields([texts[number] for texts in finished.outcomes], finished)}
            for number, head in enumerate(_heads(finished.video))
        ]

    def no_lines(self, video: Source) -> list[Line]:
        return [{**head, **self._no_fields()} for head in _heads(video)]

    def _fields(self, per_clip: list[Texts], finished: Finished[Any]) -> Line:
        """The fields for the results of one clip, or of each window, and the ending of the line."""
        error = first_error(per_clip)
        if error is not None:
            found = self._no_fields()
        elif self.frames.windows is not None:
            found = {"windows": [_best_first(found) for found in per_clip]}
        else:
            found = _best_first(per_clip[0])
        return {**found, **self._ending(finished, error)}

    def _no_fields(self) -> Line:
        return {"windows": []} if self.frames.windows is not None else _best_first([])


def _texts(video: Source) -> list[str | None]:
    """What is asked about a video: one thing, without a text, if there are no questions."""
    return [question.text for question in video.questions] or [None]


def _heads(video: Source) -> list[Line]:
    """The beginning of each line of a video."""
    if not video.questions:
        return [{"path": video.path}]
    return [
        {"path": video.path, "question": question.text, **({} if question.id is None else {"id": question.id})}
        for question in video.questions
    ]


def first_error(outcomes: Sequence[Any]) -> NotFiniteError | None:
    """The first outcome that is an error."""
    return next((outcome for outcome in outcomes if isinstance(outcome, NotFiniteError)), None)


def text_in(line: Line, name: str) -> str:
    """A field of a line that must be a text. Raises `KeyError` or `TypeError`."""
    if not isinstance(line[name], str):
        raise TypeError(f"{name} must be a text")
    return line[name]


def fingerprint(model: torch.nn.Module) -> str:
    """A short text that tells models apart: a digest of their sizes and of the first numbers of each weight."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in sorted(model.named_parameters()):
        first = weight.detach().flatten()[:16].float().cpu()
        digest.update(name.encode() + first.numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _best_first(found: list[Alternative]) -> Line:
    """A text with its score, and the alternatives; numbers that JSON does not know become null."""
    alternatives = [{"text": text, "score": score if math.isfinite(score) else None} for text, score in found]
    best = alternatives[0] if alternatives else {"text": None, "score": None}
    return {**best, "alternatives": alternatives}


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {stage: round(taken, 6) for stage, taken in seconds.items()}
