"""Features of videos or texts, in shards that are written atomically, and an index that names only existing shards.

A folder of features has an `index.jsonl` with one line per video or text, and shards. Each shard is a `.safetensors` or
`.npy` file with one array `(rows, ...)` named "features". The `features` of a line are the rows of its clips, in order
and without the last number: `[{"shard": "features-0000-000000.npy", "rows": [0, 3]}]`.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mplug2_fast.bulk.journal import Journal, Line, read_lines, write_whole
from mplug2_fast.bulk.sources import Source
from mplug2_fast.bulk.work import Finished, Frames, Work, first_error, text_in
from mplug2_fast.errors import ConfigError, MPlug2Error, NotFiniteError
from mplug2_fast.predict import Predictor
from mplug2_fast.predict.memory import clip_bytes
from mplug2_fast.tasks.base import not_finite
from mplug2_fast.tasks.features import SPACES

Kind = Literal["vision", "universal", "pooled", "contrast", "clip"]
Format = Literal["safetensors", "npy"]

INDEX = "index.jsonl"
_SHARD_NAME = re.compile(r"features-\d{4,}-\d{6,}\.(safetensors|npy)")

SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 60.0
"""A shard that is not full is written after this time, which limits how much a killed run must compute again."""


class Row(NamedTuple):
    """Where the features of a clip are stored, or will be."""

    shard: str
    row: int


class Shards:
    """Writes features to shards, one after another.

    Args:
        folder: the output folder. rank: part of the file names, so that several programs can write to one folder.
        format: file format. max_bytes, max_seconds: a shard is written when it is this large or old.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        format: Format,
        *,
        max_bytes: int = SHARD_BYTES,
        max_seconds: float = SHARD_SECONDS,
    ) -> None:
        self._folder = folder
        self._prefix = f"features-{rank:04d}-"
        self._format = format
        self._max_bytes, self._max_seconds = max_bytes, max_seconds
        pattern = re.compile(rf"{self._prefix}(\d{{1,9}})\..*")
        existing = [int(match[1]) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
        self._number = max(existing, default=-1) + 1
        self._rows: list[Tensor] = []
        self._bytes = 0
        self._since = time.monotonic()

    def add(self, features: Tensor) -> Row:
        """Adds the features of a clip to the current shard."""
        if not self._rows:
            self._since = time.monotonic()
        self._rows.append(features)
        self._bytes += features.nbytes
        return Row(self.name(), len(self._rows) - 1)

    def is_due(self) -> bool:
        """Whether the shard should be written now."""
        late = time.monotonic() - self._since >= self._max_seconds
        return bool(self._rows) and (late or self._bytes >= self._max_bytes)

    def write(self) -> None:
        """Writes the current shard. Raises `MPlug2Error`, also if a file of that name exists."""
        features = torch.stack(self._rows)
        write_whole(self._folder / self.name(), _encoded(features, self._format), overwrite=False)
        self._number += 1
        self._rows, self._bytes = [], 0

    def is_empty(self) -> bool:
        """Whether the current shard has no rows."""
        return not self._rows

    def name(self) -> str:
        """The file name of the current shard."""
        return f"{self._prefix}{self._number:06d}.{self._format}"


class Features(Work[Row | NotFiniteError]):
    """Features: one row per clip or text, in shards, and one line per video or text in the index.

    Args:
        kind: see `features_of`.
        format: file format of the shards. Features have the model's dtype.
        folder: the output folder.
        of_texts: whether sources are texts alone, whose kind must be "contrast" or "clip".
    """

    command = "features"
    guarded = True

    def __init__(
        self,
        predictor: Predictor,
        frames: Frames,
        kind: Kind,
        format: Format,
        folder: Path,
        *,
        of_texts: bool = False,
    ) -> None:
        super().__init__(predictor, frames)
        self._of_texts = of_texts
        for name, value, known in (("kind", kind, get_args(Kind)), ("format", format, get_args(Format))):
            if value not in known:
                raise ConfigError(f"there is no feature {name} {value!r}: choose {', '.join(known)}")
        if format == "npy" and self.weights.dtype == torch.bfloat16:
            raise ConfigError("npy files cannot store bfloat16: use safetensors, or the dtype float16 or float32")
        if of_texts and kind not in SPACES:
            raise ConfigError(f"texts have no {kind} features: use the kind {' or '.join(SPACES)}")
        self._kind, self._format, self._folder = kind, format, folder
        self._shards: Shards | None = None
        self._lines: list[Line] = []

    @property
    def reads_files(self) -> bool:
        return not self._of_texts

    def settings(self) -> dict[str, Any]:
        texts = {"of": "texts"} if self._of_texts else {}
        return {**super().settings(), "kind": self._kind, "format": self._format, **texts}

    def bytes_of_clip(self) -> int:
        return clip_bytes(self.predictor.model.config, num_frames=self.frames.length, itemsize=self.weights.itemsize)

    def begin(self, rank: int) -> None:
        self._shards = Shards(self._folder, rank, self._format)

    def compute(self, frames: Tensor, videos: Sequence[Source]) -> tuple[list[Row | NotFiniteError], dict[str, float]]:
        started = time.perf_counter()
        if self._of_texts:
            features = text_features(self.predictor, [video.questions[0].text for video in videos], self._kind)
        else:
            features = features_of(self.predictor.model, frames, self._kind)
        seconds = {"encode": time.perf_counter() - started}
        return [self._add(row) for row in features], seconds

    def _add(self, row: Tensor) -> Row | NotFiniteError:
        if not torch.stack(row.aminmax()).isfinite().all():
            return not_finite(self.weights.dtype)
        return self._shards.add(row.clone())  # a copy: a view would keep the whole batch

    def keys(self, video: Source) -> list[Hashable]:
        return [self.key(line) for line in self.no_lines(video)]

    def key(self, line: Line) -> Hashable:
        _shards_in(line)
        return text_in(line, "text" if self._of_texts else "path")

    def lines(self, finished: Finished[Row | NotFiniteError]) -> list[Line]:
        if (error := first_error(finished.outcomes)) is not None:
            return [{**line, **self._ending(finished, error)} for line in self.no_lines(finished.video)]
        (line,) = self.no_lines(finished.video)
        return [{**line, "features": _ranges(finished.outcomes), **self._ending(finished)}]

    def no_lines(self, video: Source) -> list[Line]:
        source = {"text": video.questions[0].text} if self._of_texts else {"path": video.path}
        return [{**source, "features": []}]

    def write(self, lines: list[Line], journal: Journal) -> None:
        """Lines are written after the shards that they name."""
        self._lines += lines
        if self._shards.is_due():
            self.flush(journal)

    def flush(self, journal: Journal) -> None:
        """Stores the name of the shard in the journal while it is written, so that `tidy` removes no other file."""
        if self._shards.is_empty():
            journal.append(self._lines)
        else:
            journal.keep(writing=self._shards.name())
            self._shards.write()
            journal.append(self._lines)
            journal.sync()
            journal.keep(writing=None, written=True)
        self._lines = []

    def tidy(self, journal: Journal) -> None:
        """Removes the shard that a killed run was writing, if no line names it.

        Raises `ConfigError` if a named shard is missing.
        """
        named = {shard for line in read_lines(journal.path) for shard in _shards_in(line)}
        if missing := sorted(shard for shard in named if not (self._folder / shard).exists()):
            more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
            raise ConfigError(
                f"{journal.path} names {missing[0]}{more}, which is missing: restore it, or use another folder"
            )
        writing = journal.kept.get("writing")
        if isinstance(writing, str) and _SHARD_NAME.fullmatch(writing) and writing not in named:
            try:
                for name in (writing, f"{writing}.tmp"):
                    (self._folder / name).unlink(missing_ok=True)
            except OSError as error:
                raise MPlug2Error(f"{self._folder / name} cannot be removed: {error.strerror}") from error


@torch.inference_mode()
def features_of(model: torch.nn.Module, frames: Tensor, kind: Kind) -> Tensor:
    """The features of clips `(batch, 3, frames, height, width)`, on the CPU, in the model's dtype.

    Returns:
        "vision": `(batch, tokens, width)`, the output of the vision encoder: the class token, averaged over the frames,
        and the patches of all frames. "universal": `(batch, tokens, hidden_size)`, the output of the universal layers,
        which the decoder reads. "pooled": `(batch, hidden_size)`, the class token of "universal". "contrast":
        `(batch, embed_dim)`, of norm 1, for comparison with those of texts. "clip": the same in CLIP's space.
    """
    weights = next(model.parameters())
    frames = frames.to(weights.device, weights.dtype)
    if kind in SPACES:
        space = SPACES[kind]
        return space.visual(model, space.encode(model, frames)).cpu()
    features = model.visual(frames) if kind == "vision" else model.encode_video(frames)
    return (features[:, 0] if kind == "pooled" else features).cpu()


@torch.inference_mode()
def text_features(predictor: Predictor, texts: Sequence[str], kind: Kind) -> Tensor:
    """The features of texts `(texts, dim)`, of norm 1, for comparison with those of videos; on the CPU."""
    model, video = predictor.model, predictor.model.config.vision.num_frames > 1
    return SPACES[kind].texts(model, predictor.tokenizer, texts, video=video).cpu()


def _rows_in(line: Line) -> list[tuple[int, int]]:
    return [tuple(piece["rows"]) for piece in line["features"]]


def _shards_in(line: Line) -> list[str]:
    """The shards that a line names. Raises `KeyError`, `TypeError` or `ValueError` for any other line."""
    shards = []
    for piece in line["features"]:
        first, end = piece["rows"]
        if type(first) is not int or type(end) is not int or not 0 <= first < end:
            raise ValueError("rows must be two numbers, the first below the second")
        if not _SHARD_NAME.fullmatch(text_in(piece, "shard")):
            raise ValueError("a shard must be named like features-0000-000000.npy")
        shards.append(piece["shard"])
    return shards


def read_features(folder: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields (path or text, features) of each video or text in a folder that `mplug2-fast features` wrote.

    Features are `(clips, ...)`. Videos with an error are skipped. Only one shard is in memory at a time.

    Raises:
        ConfigError: the index or a shard is missing or damaged.
    """
    folder = Path(folder)
    load: Callable[[str], Tensor] = _Loader(folder)
    for number, line in enumerate(read_lines(folder / INDEX), start=1):
        try:
            _shards_in(line)
            path, error = text_in(line, "text" if "text" in line else "path"), line["error"]
        except (KeyError, TypeError, ValueError) as problem:
            raise ConfigError(
                f"{folder / INDEX}, line {number}: this is not a line of an index of features"
            ) from problem
        if error is None:
            pieces = [load(piece["shard"])[slice(*piece["rows"])] for piece in line["features"]]
            if not pieces or any(len(p) != b - a for p, (a, b) in zip(pieces, _rows_in(line), strict=True)):
                raise ConfigError(f"{folder / INDEX}, line {number}: its shards lack some of its rows")
            yield path, torch.cat(pieces) if len(pieces) > 1 else pieces[0]


class _Loader:
    """Reads shards and caches the last one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name: str | None = None

    def __call__(self, name: str) -> Tensor:
        if name != self._name:
            path = self._folder / name
            try:
                if name.endswith(".npy"):
                    self._features = torch.from_numpy(np.load(path))
                else:
                    self._features = load_file(path)["features"]
            except (OSError, ValueError, KeyError, EOFError, SafetensorError) as error:
                raise ConfigError(f"{path}: the features cannot be read: {error}") from error
            self._name = name
        return self._features


def _encoded(features: Tensor, format: Format) -> bytes:
    if format == "safetensors":
        return save({"features": features})
    file = io.BytesIO()
    np.save(file, features.numpy())
    return file.getvalue()


def _ranges(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The ranges of consecutive rows within a shard."""
    pieces: list[dict[str, Any]] = []
    for shard, row in rows:
        if pieces and pieces[-1]["shard"] == shard and pieces[-1]["rows"][1] == row:
            pieces[-1]["rows"][1] = row + 1
        else:
            pieces.append({"shard": shard, "rows": [row, row + 1]})
    return pieces
