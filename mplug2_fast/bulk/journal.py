"""Lines of results that survive whatever ends the program.

A journal is a file of JSON lines. Lines that come together are one write, and go to the disk once a second and at the
end: a killed program loses no line that it wrote, a machine that loses power those of the last second. Whatever a
killed program or a dead machine left half written at the end of the file is cut off when it is opened again. A lock of
the operating system, which ends with the process, keeps a second program out.

Beside the file lies another with what the results depend on (`captions.jsonl.run`), so that a run goes on only with
the options that it began with, and a file that is something else is never written to.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mplug2_fast.errors import ConfigError, MPlug2Error

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

Line = dict[str, Any]
Key = Callable[[Line], Hashable]
"""From a line to what it is the result of."""

SECONDS_BETWEEN_SYNCS = 1.0


class Journal:
    """A file of JSON lines, open for appending, locked and whole.

    Args:
        path: the file, which is made if it is not there.
        key: from a line to what it is the result of.
        settings: what the results depend on, of values that JSON knows; it may not change while there are lines.
        choices: what is settled when the first line is written, and then stays.

    Raises:
        ConfigError: another process has it open, it cannot be written, it is something else, or it was begun with other
            settings.
    """

    def __init__(
        self, path: str | os.PathLike[str], key: Key, settings: dict[str, Any], choices: dict[str, Any] | None = None
    ) -> None:
        self.path = os.fspath(path)
        self._key = key
        self._file = _open_locked(self.path)
        self._synced = time.monotonic()
        self.done: dict[Hashable, bool] = {}
        """What there is a line for, and whether that is an error."""
        try:
            begun = os.fstat(self._file).st_size > 0
            self.choices = _settle(self.path, settings, choices or {}, begun=begun)
            """The choices that hold."""
            os.ftruncate(self._file, self._read())
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, lines: Iterable[Line]) -> None:
        """Write the lines whose key has none yet, in one piece.

        Raises:
            MPlug2Error: they cannot be written.
        """
        fresh: dict[Hashable, Line] = {}
        for line in lines:
            key = self._key(line)
            if key not in self.done:
                fresh.setdefault(key, line)
        data = "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in fresh.values()).encode()
        try:
            while data:
                data = data[os.write(self._file, data) :]
            if time.monotonic() - self._synced >= SECONDS_BETWEEN_SYNCS:
                self.sync()
        except OSError as error:
            raise MPlug2Error(f"{self.path}: the results cannot be written: {error.strerror}") from error
        self.done.update((key, line["error"] is not None) for key, line in fresh.items())

    def sync(self) -> None:
        """Have everything that is written on the disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync, and let go of the lock."""
        try:
            self.sync()
        finally:
            os.close(self._file)

    def _read(self) -> int:
        """Takes note of the lines, and returns where the last whole one ends."""
        end = 0
        with open(self.path, "rb") as file:
            for number, data in enumerate(file, start=1):
                try:
                    line = json.loads(data)
                    key, failed = self._key(line), line["error"] is not None
                except (ValueError, KeyError, TypeError):
                    # A machine that loses power leaves zeros where blocks had not been written yet. What comes after
                    # them is not lost: it is computed again.
                    if b"\0" in data or not data.endswith(b"\n"):
                        break
                    raise ConfigError(
                        f"{self.path}, line {number}: this is not a result of such a run: name another file"
                    ) from None
                if not data.endswith(b"\n"):
                    break
                self.done[key] = failed
                end += len(data)
        return end


def read_lines(path: str | os.PathLike[str]) -> Iterator[Line]:
    """The whole lines of a journal, which nobody needs to have open."""
    with open(path, "rb") as file:
        for data in file:
            if data.endswith(b"\n"):
                yield json.loads(data)


def settings_file(path: str) -> str:
    """Where a journal's settings are."""
    return f"{path}.run"


def remove_journal(path: str) -> None:
    """Remove a journal that nobody needs any more, with its settings."""
    os.unlink(path)
    os.unlink(settings_file(path))
    sync_folder(path)


def _settle(path: str, settings: dict[str, Any], choices: dict[str, Any], *, begun: bool) -> dict[str, Any]:
    """Compares the settings with those that the output was begun with, or keeps them; the choices that hold."""
    name = settings_file(path)
    settings = json.loads(json.dumps(settings))
    if not begun:
        write_whole(name, (json.dumps({"settings": settings, "choices": choices}, indent=2) + "\n").encode())
        return choices
    kept, kept_choices = _read_settings(name, path)
    names = [n for n in {**kept, **settings} if kept.get(n) != settings.get(n)]
    if names:
        different = "; ".join(f"{n} was {kept.get(n)!r} and is {settings.get(n)!r}" for n in names)
        raise ConfigError(f"{path} was begun with other options: {different}. Take those, or name another output")
    return kept_choices


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that it is there in full or not at all. Raises `MPlug2Error`."""
    temporary = f"{os.fspath(path)}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path)
    except OSError as error:
        raise MPlug2Error(f"{os.fspath(path)} cannot be written: {error.strerror}") from error


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Have the name of a file on the disk, which is its folder's."""
    folder = os.open(os.path.dirname(os.fspath(path)) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_settings(name: str, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with open(name, "rb") as file:
            kept = json.load(file)
        return kept["settings"], kept["choices"]
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is there already, and {name}, which a run keeps beside its output, is not: name another output"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{name}, which tells with which options {path} was begun, cannot be read: name another output"
        ) from error


def _open_locked(path: str) -> int:
    """The file, for appending, with its lock taken."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise ConfigError(f"{path}: the results cannot be written there: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ConfigError(f"{path} is not a regular file: a run that can be taken up again needs one")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be locked ({error.strerror}): name an output on a file system that has locks"
            ) from error
        # Whoever held the lock until now may have removed the file.
        if not os.path.exists(path) or not os.path.samestat(os.stat(path), os.fstat(file)):
            raise BlockingIOError(errno.EAGAIN, "it was replaced")
        sync_folder(path)
    except BlockingIOError as error:
        os.close(file)
        raise ConfigError(f"{path}: another run is writing to it: wait for it, or name another output") from error
    except BaseException:
        os.close(file)
        raise
    return file
