"""The videos of a bulk run: from files, folders, lists and questions, without duplicates, in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mplug2_fast.bulk.lists import lines_of, parsed
from mplug2_fast.errors import ConfigError
from mplug2_fast.text import is_text

_EXTENSIONS = """
.3g2 .3gp .apng .asf .avi .avif .bmp .divx .dv .f4v .flv .gif .h264 .heic .heif .hevc .ivf .jfif .jp2 .jpe .jpeg .jpg
.m2ts .m2v .m4v .mjpeg .mjpg .mkv .mov .mp4 .mpe .mpeg .mpg .mts .mxf .ogm .ogv .png .qt .rm .rmvb .tif .tiff .ts .vob
.webm .webp .wmv .y4m
"""
EXTENSIONS = frozenset(_EXTENSIONS.split())
"""Extensions of videos and images, which select the files of a folder. Explicitly named files need none of them."""

LIST_EXTENSION = ".txt"

MAX_PATH_BYTES = 2**16
MAX_QUESTION_BYTES = 2**24
"""Maximum size of a line with a question, whose other fields may be long."""


class Question(NamedTuple):
    """A question about a video. `id` is chosen by the user."""

    text: str
    id: str | int | None = None


@dataclass(frozen=True)
class Source:
    """A video and the questions about it, if any."""

    path: str
    """Empty for a text alone, which is its only question."""
    questions: tuple[Question, ...] = ()

    @classmethod
    def of(cls, files: Sequence[str], questions: Iterable[Question] = ()) -> Source:
        """The source of one file, or of two images that go together."""
        asked = tuple(questions)
        return cls(files[0], asked) if len(files) == 1 else Pair(path_of_files(files), asked, tuple(files))

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are decoded."""
        return (self.path,)


@dataclass(frozen=True)
class Pair(Source):
    """Two images that go together, and the questions about both. Its path names both."""

    images: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        return self.images


@dataclass(frozen=True)
class Sources:
    """All videos, in the order of their first mention."""

    videos: list[Source]
    repeated: int = 0
    """The number of duplicate videos, or questions, that were ignored."""
    not_media: int = 0
    """The number of files in folders without the extension of a video or an image."""
    hidden: int = 0
    """The number of hidden files and folders that were skipped: names that start with a dot, and `__MACOSX`."""
    linked_again: int = 0
    """The number of links that were skipped because their folder was read already."""
    empty: tuple[str, ...] = ()
    """Folders without videos or images."""
    unreadable: tuple[str, ...] = ()
    """Folders that cannot be read, each with the reason."""


def find_videos(inputs: Iterable[str | os.PathLike[str]]) -> Sources:
    """Finds the videos and images in files, folders and lists.

    A folder stands for the videos and images in it and below it, found by extension and sorted. Links to folders are
    followed; each folder is read once. Hidden files and folders are skipped. A `.txt` file, or `-` for standard input,
    is a list with one file or folder per line. Any other path is a video or an image, whether it exists or not. Paths
    are duplicates if they are equal apart from `./` and repeated slashes.

    Raises:
        ConfigError: a list cannot be read, or there are no videos at all.
    """
    named = [os.fspath(given) for given in inputs]
    not_media = repeated = hidden = linked_again = 0
    found: dict[str, None] = {}
    empty: list[str] = []
    unreadable: list[str] = []
    for path in _lists_read(named):
        if not path:
            raise ConfigError("a path is empty: name a file, a folder or a list")
        videos = [_spelled(path)]
        if os.path.isdir(path):
            folder = _read_folder(path)
            videos = [_spelled(file) for file in folder.files if os.path.splitext(file)[1].lower() in EXTENSIONS]
            not_media += len(folder.files) - len(videos)
            hidden += folder.hidden
            linked_again += folder.linked_again
            unreadable += folder.unreadable
            if not videos and not folder.unreadable:
                empty.append(path)
        for video in videos:
            repeated += video in found
            found[video] = None
    if not found:
        if unreadable:
            raise ConfigError("; ".join(unreadable))
        raise ConfigError(f"no videos or images in {_listed(named)}: name files, folders or lists")
    videos = [Source(path) for path in found]
    return Sources(videos, repeated, not_media, hidden, linked_again, tuple(empty), tuple(unreadable))


def ask_all(sources: Sources, question: str) -> Sources:
    """The same videos, each with this question."""
    asked = (Question(question),)
    return replace(sources, videos=[replace(video, questions=asked) for video in sources.videos])


def texts_alone(texts: Iterable[str]) -> Sources:
    """Texts without files, for tasks on texts alone. Raises `ConfigError` without a text."""
    given = list(texts)
    unique = dict.fromkeys(given)
    if not unique:
        raise ConfigError("there are no texts")
    return Sources([Source("", (Question(text),)) for text in unique], len(given) - len(unique))


def read_questions(path: str | os.PathLike[str]) -> Sources:
    """Reads questions from a JSONL file, or from standard input (`-`).

    Each line is an object with `path`, `question` and, optionally, `id`. In place of `path`, `images` may name two
    images that go together. Other fields are ignored. Videos are in the order of their first mention, each with all
    questions about it.

    Raises:
        ConfigError: the file cannot be read, a line is not such an object, or there are no questions.
    """
    name = os.fspath(path)
    videos: dict[tuple[str, ...], dict[Question, None]] = {}
    repeated = 0
    lines = lines_of(name, "a file of questions", max_bytes=MAX_QUESTION_BYTES)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        files, question = _asked(line.decode("utf-8", "surrogateescape"), f"{name}, line {number}")
        questions = videos.setdefault(files, {})
        repeated += question in questions
        questions[question] = None
    if not videos:
        raise ConfigError(f'{name}: no questions: a line must be like {{"path": "a.mp4", "question": "What is it?"}}')
    return Sources([Source.of(files, questions) for files, questions in videos.items()], repeated)


def path_of_files(files: Sequence[str]) -> str:
    """The path of a source: its file, or the names of two files."""
    return " and ".join(files)


def _asked(line: str, where: str) -> tuple[tuple[str, ...], Question]:
    """The files of a line, and its question."""
    try:
        fields: Any = parsed(line)
    except ValueError as error:
        raise ConfigError(f"{where}: this is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: this is not a JSON object")
    given = fields.get("images")
    pair = "path" not in fields and given is not None
    files = given if pair else [fields.get("path")]
    if pair and not (isinstance(given, list) and len(given) == 2 and all(map(_is_filled, given))):
        raise ConfigError(f"{where}: 'images' must be a list of two paths")
    for name, there in (("path", all(map(_is_filled, files))), ("question", _is_filled(fields.get("question")))):
        if not there:
            raise ConfigError(f"{where}: the object needs a text {name!r}")
    for file in files:
        _require_path(file, where, "images" if pair else "path")
    if not is_text(fields["question"]):
        raise ConfigError(f"{where}: the 'question' has characters that are not UTF-8")
    identity = fields.get("id")
    if isinstance(identity, bool) or not isinstance(identity, (str, int, type(None))):
        raise ConfigError(f"{where}: the 'id' must be a text or an integer")
    return tuple(map(_spelled, files)), Question(fields["question"], identity)


def _is_filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _require_path(path: str, where: str, name: str) -> None:
    """Raises `ConfigError` for a path that no file can have."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: no file can have this {name!r}: {error.reason}") from error
    if "\0" in path:
        raise ConfigError(f"{where}: no file can have this {name!r}: it has a NUL character")


def _lists_read(named: Iterable[str]) -> Iterator[str]:
    """The files and folders, with lists replaced by their contents."""
    for path in named:
        if path == "-" or (path.lower().endswith(LIST_EXTENSION) and not os.path.isdir(path)):
            lines = lines_of(path, "a list of videos", max_bytes=MAX_PATH_BYTES)
            yield from (os.fsdecode(line) for line in lines if line.strip())
        else:
            yield path


@dataclass
class _Folder:
    """The contents of a folder and the folders below it."""

    files: list[str] = field(default_factory=list)
    hidden: int = 0
    linked_again: int = 0
    unreadable: list[str] = field(default_factory=list)


def _read_folder(top: str) -> _Folder:
    """Finds the files in a folder and below it, then those in linked folders. Reads no folder twice."""
    found = _Folder()
    seen: set[tuple[int, int]] = set()
    links = [top]
    while links:
        folders = [links.pop(0)]
        while folders:
            folder = folders.pop()
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    found.linked_again += 1
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as entries:
                    named = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                found.unreadable.append(f"{folder}: the folder cannot be read: {error.strerror}")
                continue
            inner = []
            for entry in named:
                if _is_hidden(entry.name):
                    found.hidden += 1
                elif not _is_folder(entry):
                    found.files.append(entry.path)
                elif entry.is_symlink():
                    links.append(entry.path)
                else:
                    inner.append(entry.path)
            folders += reversed(inner)
    return found


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a broken link: the decoder reports it
        return False


def _listed(named: list[str]) -> str:
    """Paths for an error message: at most five."""
    more = f" and {len(named) - 5:,} more" if len(named) > 5 else ""
    return ", ".join(named[:5]) + more if named else "nothing"


def _spelled(path: str) -> str:
    """Normalises a path: removes `./` and repeated slashes. `..` stays, because of links."""
    return str(Path(path))
