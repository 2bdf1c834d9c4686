"""What a bulk run computes for each batch, and the lines it writes."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from mplug2_fast.bulk.journal import Journal, Line
from mplug2_fast.bulk.sources import Source
from mplug2_fast.errors import ConfigError, NotFiniteError, printable
from mplug2_fast.predict.boxes import box_fields
from mplug2_fast.predict.memory import clip_bytes
from mplug2_fast.tasks import Alternative
from mplug2_fast.video import Windows
from mplug2_fast.video.preparation import MPLUG2

if TYPE_CHECKING:
    from mplug2_fast.predict import Predictor
    from mplug2_fast.tasks import Texts
    from mplug2_fast.video import Clip, Preparation

_T = TypeVar("_T")


@dataclass(frozen=True)
class Frames:
    """The frames of a clip: `count` frames spread over the video, or each of the windows that cover it."""

    count: int
    windows: Windows | None = None

    @property
    def length(self) -> int:
        """Number of frames of a clip."""
        return self.count if self.windows is None else self.windows.length

    def settings(self) -> dict[str, Any]:
        """As settings of a journal."""
        if self.windows is None:
            return {"frames": self.count, "windows": None}
        return {"frames": None, "windows": [self.windows.length, self.windows.stride]}


@dataclass
class Finished(Generic[_T]):
    """A video whose clips are all computed: the outcome of each clip, in order, and the seconds by stage.

    `size` is the width and height of its frames in the file, upright.
    """

    video: Source
    outcomes: list[_T] = field(default_factory=list)
    indices: list[list[int]] = field(default_factory=list)
    backend: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    size: tuple[int, int] | None = None

    def add(self, clip: Clip, outcome: _T, seconds: dict[str, float]) -> None:
        """Adds the next clip."""
        self.outcomes.append(outcome)
        self.indices.append(clip.indices)
        self.backend = clip.backend
        self.size = clip.size
        for stage, taken in {"decode": clip.seconds, **seconds}.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + taken


class Work(ABC, Generic[_T]):
    """Computes lines from batches of clips.

    Args:
        predictor: the model and its task. frames: the frames of a clip.
    """

    command: str
    guarded: bool = False
    """Whether other files depend on the journal: see `Journal`."""

    def __init__(self, predictor: Predictor, frames: Frames) -> None:
        self.predictor = predictor
        self.frames = frames

    @property
    def reads_files(self) -> bool:
        """Whether sources are files. Otherwise they are texts alone, and `compute` gets no frames."""
        return self.predictor.task.reads_files

    @property
    def num_files(self) -> int:
        """Files of each source."""
        return 1

    def require_files(self, videos: Iterable[Source]) -> None:
        """Raises `ConfigError` for a source with more or fewer files than `num_files`."""
        wrong = next((video for video in videos if len(video.files) != self.num_files), None)
        if wrong is not None:
            name, needed = self.predictor.task.name, "two images" if self.num_files == 2 else "one file"
            raise ConfigError(f"{printable(wrong.path)}: {name} takes {needed} at a time, got {len(wrong.files)}")

    @property
    def weights(self) -> Tensor:
        """One of the model's parameters, for its device and dtype."""
        return next(self.predictor.model.parameters())

    @property
    def image_size(self) -> int:
        return self.predictor.model.config.vision.image_size

    @property
    def preparation(self) -> Preparation:
        return self.predictor.preparation

    def settings(self) -> dict[str, Any]:
        """What the lines depend on besides the videos."""
        return {"command": self.command, **model_settings(self.predictor, self.frames)}

    def begin(self, rank: int) -> None:
        """Prepares for writing. Called once, before anything is computed."""

    def write(self, lines: list[Line], journal: Journal) -> None:
        """Writes lines, or keeps them until `flush`."""
        journal.append(lines)

    def flush(self, journal: Journal) -> None:
        """Writes all lines that were kept."""

    def tidy(self, journal: Journal) -> None:
        """Removes what a killed run left behind. Called before any `begin`, and for each part that is moved."""

    @abstractmethod
    def bytes_of_clip(self) -> int:
        """The memory per clip of a batch."""

    @abstractmethod
    def compute(self, frames: Tensor, videos: Sequence[Source]) -> tuple[list[_T], dict[str, float]]:
        """The outcome of each clip, and the seconds by stage for the batch.

        Args:
            frames: `(batch, 3, frames, height, width)`, normalised, on the CPU. videos: the video of each clip.

        Raises:
            torch.OutOfMemoryError: the batch is too large.
        """

    @abstractmethod
    def keys(self, video: Source) -> list[Hashable]:
        """The keys of a video's lines."""

    @abstractmethod
    def key(self, line: Line) -> Hashable:
        """The key of a line.

        Raises:
            KeyError, TypeError, ValueError: it is not a line of this work.
        """

    @abstractmethod
    def lines(self, finished: Finished[_T]) -> list[Line]:
        """The lines of a video. Lines with results that are not finite are errors."""

    @abstractmethod
    def no_lines(self, video: Source) -> list[Line]:
        """The lines of a failed video, without the error."""

    def error_lines(self, video: Source, clip: Clip) -> list[Line]:
        """The lines of a video that could not be decoded."""
        reason = " ".join(str(clip.error).removeprefix(f"{video.path}: ").split())
        ending = {"frames": [], "decoder": None, "seconds": _rounded({"decode": clip.seconds}), "error": reason}
        if clip.transient:
            ending["transient"] = True
        return [{**line, **ending} for line in self.no_lines(video)]

    def _ending(self, finished: Finished[_T], error: NotFiniteError | None = None) -> Line:
        """The last fields of the line of a computed video. Boxes need the `size` of its frames: width and height."""
        indices = finished.indices if self.frames.windows is not None else finished.indices[0]
        return {
            "frames": indices,
            "decoder": finished.backend,
            "seconds": _rounded(finished.seconds),
            **({} if self.preparation == MPLUG2 else {"size": finished.size}),
            "error": None if error is None else str(error),
        }


class Predict(Work["list[Texts]"]):
    """Results of any task: one line per video, or one per question. A video is encoded once for all its questions.

    Args:
        predictor: the model and its task. frames: the frames of a clip.
        options: of the task. A run with other options cannot resume this one's file.
    """

    def __init__(self, predictor: Predictor, frames: Frames, options: dict[str, Any]) -> None:
        super().__init__(predictor, frames)
        if frames.windows is not None and predictor.preparation.views > 1:
            raise ConfigError("windows of a video have no clips and crops: use either")
        if frames.windows is not None and predictor.task.num_files > 1:
            raise ConfigError(f"{predictor.task.name} takes images, which have no windows")
        self.command = predictor.command
        self._options = predictor.complete_options(**options)
        self._respond = predictor.responder(**self._options)

    @property
    def num_files(self) -> int:
        return self.predictor.task.num_files

    def settings(self) -> dict[str, Any]:
        options = {
            name: _digest("\n".join(value).encode()) if name == "candidates" else value
            for name, value in self._options.items()
        }
        task = self.predictor.task
        made_with = {"made_with": _digest(json.dumps(settings).encode())} if (settings := task.settings()) else {}
        return {**super().settings(), "task": task.name, **made_with, **options}

    def bytes_of_clip(self) -> int:
        options = {name: self._options.get(name) or 1 for name in ("num_beams", "max_length")}
        config, views = self.predictor.model.config, self.predictor.preparation.views * self.num_files
        return views * clip_bytes(config, num_frames=self.frames.length, itemsize=self.weights.itemsize, **options)

    def compute(self, frames: Tensor, videos: Sequence[Source]) -> tuple[list[list[Texts]], dict[str, float]]:
        if not self.reads_files:
            texts = [video.questions[0].text for video in videos]
            results, seconds = self.predictor.say(None, lambda nothing: self._respond(nothing, texts))
            return [[result] for result in results], {"generate": seconds}
        image_embeds, encoding = self.predictor.encode(frames)
        asked = [(clip, text) for clip, video in enumerate(videos) for text in _texts(video)]
        found: list[list[Texts]] = [[] for _ in videos]
        generating = 0.0
        for start in range(0, len(asked), len(videos)):  # as many texts at a time as clips
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
        path = text_in(line, "path") if self.reads_files else ""
        return (path, text_in(line, "question"), line.get("id")) if self.predictor.task.reads_text else path

    def lines(self, finished: Finished[list[Texts]]) -> list[Line]:
        return [
            {**head, **self._fields([texts[number] for texts in finished.outcomes], finished)}
            for number, head in enumerate(_heads(finished.video))
        ]

    def no_lines(self, video: Source) -> list[Line]:
        return [{**head, **self._no_fields()} for head in _heads(video)]

    def _fields(self, per_clip: list[Texts], finished: Finished[Any]) -> Line:
        """The fields with the results of the clip, or of each window, and the last fields."""
        error = first_error(per_clip)
        if error is not None:
            found = self._no_fields()
        elif self.frames.windows is not None:
            found = {"windows": [self._result(found, finished) for found in per_clip]}
        else:
            found = self._result(per_clip[0], finished)
        return {**found, **self._ending(finished, error)}

    def _no_fields(self) -> Line:
        return {"windows": []} if self.frames.windows is not None else self._result([])

    def _result(self, found: Sequence[Alternative], finished: Finished[Any] | None = None) -> Line:
        """The fields with the result of one clip."""
        fields = _best_first(found)
        if not self.predictor.task.finds_boxes:
            return fields
        size = None if finished is None else finished.size
        seen = found[0].box if found else None
        box = None if seen is None or size is None else self.preparation.box_in_pixels(seen, *size)
        return {**fields, **box_fields(box, size)}


def _texts(video: Source) -> list[str | None]:
    """The texts for a video: its questions, or a single None."""
    return [question.text for question in video.questions] or [None]


def _heads(video: Source) -> list[Line]:
    """The first fields of each line of a video."""
    if not video.questions:
        return [{"path": video.path}]
    path = {"path": video.path} if video.path else {}
    return [
        {**path, "question": question.text, **({} if question.id is None else {"id": question.id})}
        for question in video.questions
    ]


def first_error(outcomes: Sequence[Any]) -> NotFiniteError | None:
    """The first outcome that is an error."""
    return next((outcome for outcome in outcomes if isinstance(outcome, NotFiniteError)), None)


def text_in(line: Line, name: str) -> str:
    """A text field of a line. Raises `KeyError` or `TypeError`."""
    if not isinstance(line[name], str):
        raise TypeError(f"{name} must be a text")
    return line[name]


def model_settings(predictor: Predictor, frames: Frames) -> dict[str, Any]:
    """The model, and how files become its input."""
    return {
        "model": fingerprint(predictor.model),
        "dtype": predictor.model.precision,
        **frames.settings(),
        # Runs from before other preparations existed have no such setting, and still resume.
        **({} if predictor.preparation == MPLUG2 else {"preparation": predictor.preparation.name}),
    }


def fingerprint(model: torch.nn.Module) -> str:
    """Identifies a model: a digest of its configuration and of the first numbers of each parameter."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, weight in sorted(model.named_parameters()):
        first = weight.detach().flatten()[:16].float().cpu()
        digest.update(name.encode() + first.numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _best_first(found: Sequence[Alternative]) -> Line:
    """The best text, its score and the alternatives. Infinities and NaN become null."""
    alternatives = [{"text": text, "score": score if math.isfinite(score) else None} for text, score in found]
    best = alternatives[0] if alternatives else {"text": None, "score": None}
    return {**best, "alternatives": alternatives}


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {stage: round(taken, 6) for stage, taken in seconds.items()}
