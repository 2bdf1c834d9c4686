"""What a bulk run works on: the videos that files, folders, lists and questions name, each once, in a fixed order."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mplug2_fast.errors import ConfigError

_EXTENSIONS = """
.3g2 .3gp .apng .asf .avi .bmp .divx .dv .f4v .flv .gif .h264 .hevc .ivf .jpeg .jpg .m2ts .m2v .m4v .mjpeg .mjpg .mkv
.mov .mp4 .mpe .mpeg .mpg .mts .mxf .ogm .ogv .png .qt .rm .rmvb .tif .tiff .ts .vob .webm .webp .wmv .y4m
"""
EXTENSIONS = frozenset(_EXTENSIONS.split())
"""How files in a folder end that are taken for videos or images. A file that is named itself may end as it likes."""

LIST_EXTENSION = ".txt"


class Question(NamedTuple):
    """What is asked about a video; `id` is the user's own."""

    text: str
    id: str | int | None = None


@dataclass(frozen=True)
class Source:
    """A video, and what is asked about it, if anything is."""

    path: str
    questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Sources:
    """All videos in the order in which they were first named."""

    videos: list[Source]
    repeated: int = 0
    """How many times a video, or a question about it, was named again."""
    passed_over: int = 0
    """How many files in folders do not end as a video or an image does."""
    empty: tuple[str, ...] = ()
    """Folders without any video."""


def find_videos(inputs: Iterable[str | os.PathLike[str]]) -> Sources:
    """The videos that files, folders and lists name.

    A folder stands for the videos and images in it and below it, by their extensions, sorted. A file that ends with
    `.txt`, or `-` for standard input, is a list of files and folders, one a line. Anything else is a video or an image,
    whether it is there or not. Paths are compared as they are written, but for `./` and doubled slashes.

    Raises:
        ConfigError: a list or a folder cannot be read, or there is no video in all of them.
    """
    named = [os.fspath(given) for given in inputs]
    passed_over = repeated = 0
    found: dict[str, None] = {}
    empty: list[str] = []
    for path in _lists_read(named):
        videos = [_spelled(path)]
        if os.path.isdir(path):
            files = list(_files_below(path))
            videos = [_spelled(file) for file in files if os.path.splitext(file)[1].lower() in EXTENSIONS]
            passed_over += len(files) - len(videos)
            if not videos:
                empty.append(path)
        for video in videos:
            repeated += video in found
            found[video] = None
    if not found:
        raise ConfigError(f"there are no videos in {', '.join(named) or 'nothing'}: name files, folders or lists")
    return Sources([Source(path) for path in found], repeated, passed_over, tuple(empty))


def ask_all(sources: Sources, question: str) -> Sources:
    """The same videos, each with the same question."""
    asked = (Question(question),)
    return replace(sources, videos=[Source(video.path, asked) for video in sources.videos])


def read_questions(path: str | os.PathLike[str]) -> Sources:
    """The questions of a JSONL file, `-` for standard input: objects with `path`, `question` and perhaps an `id`.

    Other fields are left alone. A video comes where it is first named, with all questions about it.

    Raises:
        ConfigError: the file cannot be read, a line is not such an object, or there is none.
    """
    name = os.fspath(path)
    videos: dict[str, dict[Question, None]] = {}
    repeated = 0
    for number, line in enumerate(_lines(name), start=1):
        if not line.strip():
            continue
        video, question = _asked(line, f"{name}, line {number}")
        questions = videos.setdefault(video, {})
        repeated += question in questions
        questions[question] = None
    if not videos:
        raise ConfigError(f'{name}: there are no questions: a line is {{"path": "a.mp4", "question": "What is it?"}}')
    return Sources([Source(video, tuple(questions)) for video, questions in videos.items()], repeated)


def _asked(line: str, where: str) -> tuple[str, Question]:
    try:
        fields: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: this is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: this is not a JSON object")
    for name in ("path", "question"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            raise ConfigError(f"{where}: the object needs a {name!r} that is a text")
    try:
        os.fsencode(fields["path"])
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: no file can have this 'path': {error.reason}") from error
    identity = fields.get("id")
    if isinstance(identity, bool) or not isinstance(identity, (str, int, type(None))):
        raise ConfigError(f"{where}: the 'id' must be a text or an integer")
    return _spelled(fields["path"]), Question(fields["question"], identity)


def _lists_read(named: Iterable[str]) -> Iterator[str]:
    """The files and folders, those in lists in place of the lists."""
    for path in named:
        if path == "-" or (path.lower().endswith(LIST_EXTENSION) and not os.path.isdir(path)):
            yield from (line for line in _lines(path) if line.strip())
        else:
            yield path


def _files_below(folder: str) -> Iterator[str]:
    def unreadable(error: OSError) -> None:
        raise ConfigError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders.sort()
        yield from (os.path.join(parent, file) for file in sorted(files))


def _lines(path: str) -> Iterator[str]:
    """Lines without their ends; file names may hold any bytes."""
    try:
        if path == "-":
            yield from (os.fsdecode(line).rstrip("\r\n") for line in sys.stdin.buffer)
            return
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            yield from (line.rstrip("\r\n") for line in file)
    except OSError as error:
        raise ConfigError(f"{path}: the list cannot be read: {error.strerror}") from error


def _spelled(path: str) -> str:
    """One spelling of a path, without `./` and doubled slashes; `..` stays, since links make a difference there."""
    return str(Path(path))
