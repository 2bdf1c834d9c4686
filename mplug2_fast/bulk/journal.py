"""Lines of results that survive whatever ends the program.

A journal is a file of JSON lines. Lines that come together are one write, and go to the disk once a second and at the
end: a killed program loses no line that it wrote, a machine that loses power those of the last second. Whatever a
killed program or a dead machine left half written at the end of the file is cut off when it is opened again. A lock of
the operating system, which ends with the process, keeps a second program out.

Somebody may remove, replace or change the file while it is open. That is seen at the next write, and at the end: the
lines are saved to a file that has a name, and the run stops with an error.

Beside the file lies another with what the results depend on (`captions.jsonl.run`), so that a run goes on only with
the options that it began with, and a file that is something else is never written to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mplug2_fast.bulk.lists import open_regular, parsed
from mplug2_fast.bulk.rescue import rename_new, rescue, sync_folder
from mplug2_fast.errors import ConfigError, MPlug2Error

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

Line = dict[str, Any]
Key = Callable[[Line], Hashable]
"""From a line to what it is the result of."""

SECONDS_BETWEEN_SYNCS = 1.0

MAX_LINE_BYTES = 2**30
_MAX_SETTINGS_BYTES = 2**20


class Journal:
    """A file of JSON lines, open for appending, locked and whole.

    Args:
        path: the file, which is made if it is not there.
        key: from a line to what it is the result of.
        settings: what the results depend on, of values that JSON knows; it may not change while there are lines.
        choices: numbers that are settled when the first line is written, and then stay.
        guarded: other files depend on the lines. It is an error if the lines are gone; otherwise the run starts anew.

    Raises:
        ConfigError: another process has it open, it cannot be written, it is something else, its lines are gone, or it
            was begun with other settings.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        key: Key,
        settings: dict[str, Any],
        choices: dict[str, int] | None = None,
        *,
        guarded: bool = False,
    ) -> None:
        self.path = os.fspath(path)
        self._key = key
        self._settings = json.loads(json.dumps(settings))
        self._guarded = guarded
        self._lost = False
        self._file = _open_locked(self.path)
        self._synced = time.monotonic()
        self.done: dict[Hashable, bool] = {}
        """What there is a line for, and whether that is an error."""
        self.choices: dict[str, int] = choices or {}
        """The choices that hold."""
        self.kept: dict[str, Any] = {}
        """What `keep` was given, by this run or an earlier one."""
        try:
            self._settle()
            self._size = self._read()
            os.ftruncate(self._file, self._size)
        except OSError as error:
            os.close(self._file)
            raise ConfigError(f"{self.path}: the results there cannot be read: {error.strerror}") from error
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
            MPlug2Error: they cannot be written, or the file was removed, replaced or changed by somebody else.
        """
        fresh: dict[Hashable, Line] = {}
        for line in lines:
            key = self._key(line)
            if key not in self.done:
                fresh.setdefault(key, line)
        data = "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in fresh.values()).encode()
        size = self._size + len(data)
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # half a line is cut off when the file is opened again
                os.ftruncate(self._file, self._size)
            raise MPlug2Error(f"{self.path}: the results cannot be written: {error.strerror}") from error
        self._size = size
        self.done.update((key, line["error"] is not None) for key, line in fresh.items())
        self._check_place()
        if time.monotonic() - self._synced >= SECONDS_BETWEEN_SYNCS:
            self.sync()

    def sync(self) -> None:
        """Have everything that is written on the disk. Raises `MPlug2Error`."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise MPlug2Error(f"{self.path}: the results cannot be written: {error.strerror}") from error
        self._synced = time.monotonic()
        if not os.path.exists(settings_file(self.path)):
            warnings.warn(f"{settings_file(self.path)} was removed during the run: it is written again", stacklevel=2)
            self._write_settings()

    def keep(self, **values: Any) -> None:
        """Store values with the settings for the next run. Raises `MPlug2Error`."""
        self.kept |= values
        self._write_settings()

    def drop_failed(self, keys: Iterable[Hashable]) -> None:
        """Remove the lines of these keys that are errors, all at once. Raises `MPlug2Error`."""
        dropped = {key for key in keys if self.done.get(key)}
        if not dropped:
            return
        path = os.path.realpath(self.path)
        try:
            file, temporary = tempfile.mkstemp(prefix=f"{os.path.basename(path)}.", dir=os.path.dirname(path))
            try:
                os.fchmod(file, stat.S_IMODE(os.fstat(self._file).st_mode))
                fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
                fcntl.flock(file, fcntl.LOCK_EX)
                self._copy_without(dropped, file)
                os.fsync(file)
                os.replace(temporary, path)
            except BaseException:
                os.close(file)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
            sync_folder(path)
        except OSError as error:
            raise MPlug2Error(f"{self.path} cannot be written: {error.strerror}") from error
        os.close(self._file)
        self._file, self._size = file, os.fstat(file).st_size
        for key in dropped:
            del self.done[key]

    def remove(self) -> None:
        """Remove the file, which nobody needs any more, with its settings."""
        self._lost = True  # on purpose: nothing to save
        for path in (self.path, settings_file(self.path)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        sync_folder(self.path)

    def close(self) -> None:
        """Sync, and let go of the lock. Raises `MPlug2Error` as `append` does."""
        try:
            if not self._lost:
                self._check_place()
                self.sync()
        finally:
            os.close(self._file)

    def _settle(self) -> None:
        """Compares the settings with those that the output was begun with, or writes them."""
        name = settings_file(self.path)
        with contextlib.suppress(OSError):  # left by a run that was killed while it wrote the settings
            os.unlink(_temporary(name))
        if os.fstat(self._file).st_size == 0:
            kept: dict[str, Any] = {}
            with contextlib.suppress(ConfigError):
                kept = _read_settings(name, self.path, ())[2]
            if self._guarded and kept.get("written"):
                raise ConfigError(
                    f"{self.path} has no lines, but {name} says that a run wrote some: restore it, or name another "
                    "output"
                )
            self._write_settings()
            return
        begun, self.choices, self.kept = _read_settings(name, self.path, self.choices)
        names = [n for n in {**begun, **self._settings} if begun.get(n) != self._settings.get(n)]
        if names:
            different = "; ".join(f"{n} was {begun.get(n)!r} and is {self._settings.get(n)!r}" for n in names)
            raise ConfigError(
                f"{self.path} was begun with other options: {different}. Take those, or name another output"
            )

    def _write_settings(self) -> None:
        parts = {"settings": self._settings, "choices": self.choices} | ({"kept": self.kept} if self.kept else {})
        write_whole(settings_file(self.path), _settings_data(parts))

    def _read(self) -> int:
        """Takes note of the lines, and returns where the last whole one ends."""
        end = 0
        for number, data in enumerate(self._lines(), start=1):
            try:
                key, failed = self._parsed(data)
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

    def _lines(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            while data := file.readline(MAX_LINE_BYTES):
                yield data

    def _parsed(self, data: bytes) -> tuple[Hashable, bool]:
        """The key of a line, and whether it is an error. Raises for what is no line of such a journal."""
        line = parsed(data)
        key, error = self._key(line), line["error"]
        hash(key)
        if not isinstance(error, (str, type(None))):
            raise TypeError("an error must be a text")
        return key, error is not None

    def _copy_without(self, dropped: Collection[Hashable], target: int) -> None:
        with open(target, "wb", closefd=False) as file:
            for data in self._lines():
                if self._parsed(data)[0] not in dropped:
                    file.write(data)

    def _check_place(self) -> None:
        """Whether the lines are still where the path leads."""
        status = os.fstat(self._file)
        try:
            is_there = os.path.samestat(os.stat(self.path), status)
        except OSError:
            is_there = False
        if not is_there:
            self._lost = True
            folder = os.path.dirname(self.path) or "."
            if self._guarded and not os.path.isdir(folder):
                raise MPlug2Error(f"{folder} was removed during the run, with the results in it")
            parts = {"settings": self._settings, "choices": self.choices, "kept": self.kept}
            raise MPlug2Error(rescue(self._file, self.path, settings_file, _settings_data(parts)))
        if status.st_size != self._size:
            self._lost = True
            raise MPlug2Error(
                f"{self.path} was changed by another program during the run: find out which, then start the same "
                "command again, which does what is missing"
            )


def read_lines(path: str | os.PathLike[str]) -> Iterator[Line]:
    """The whole lines of a journal, which nobody needs to have open.

    Raises:
        ConfigError: it cannot be read, or a line is not a JSON object.
    """
    try:
        with open(path, "rb") as file:
            for number, data in enumerate(file, start=1):
                if data.endswith(b"\n"):
                    yield _object(data, f"{os.fspath(path)}, line {number}")
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)}: the results there cannot be read: {error.strerror}") from error


def _object(data: bytes, where: str) -> Line:
    try:
        line = parsed(data)
    except ValueError as error:
        raise ConfigError(f"{where}: this is not JSON: {error}") from error
    if not isinstance(line, dict):
        raise ConfigError(f"{where}: this is not a JSON object")
    return line


def settings_file(path: str) -> str:
    """Where a journal's settings are."""
    return f"{path}.run"


def _temporary(path: str | os.PathLike[str]) -> str:
    """Where `write_whole` writes until the file is complete."""
    return f"{os.fspath(path)}.tmp"


def write_whole(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = True) -> None:
    """Write a file so that it is there in full or not at all. Raises `MPlug2Error`."""
    temporary = _temporary(path)
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                os.replace(temporary, path)
            else:
                rename_new(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path)
    except OSError as error:
        raise MPlug2Error(f"{os.fspath(path)} cannot be written: {error.strerror}") from error


def _settings_data(parts: dict[str, Any]) -> bytes:
    return (json.dumps(parts, indent=2) + "\n").encode()


def _read_settings(
    name: str, path: str, numbers: Collection[str]
) -> tuple[dict[str, Any], dict[str, int], dict[str, Any]]:
    """The settings, the choices and what was kept; the choices have these `numbers`."""
    try:
        with open_regular(name) as file:
            data = file.read(_MAX_SETTINGS_BYTES + 1)
        if len(data) > _MAX_SETTINGS_BYTES:
            raise ValueError("it is too large")
        found = parsed(data)
        parts = found["settings"], found["choices"], found.get("kept", {})
        for part in parts:
            if not isinstance(part, dict):
                raise TypeError("a part of it is not an object")
        for choice in numbers:
            if type(parts[1][choice]) is not int or parts[1][choice] < 1:
                raise ValueError(f"{choice} must be a number of at least 1")
        return parts
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is there already, and {name}, which a run keeps beside its output, is not: name another output"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{name}, which tells with which options {path} was begun, cannot be read: name another output"
        ) from error


def _open_locked(path: str) -> int:
    """The file, for appending, with its lock taken."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: the results cannot be written there: {reason}") from error
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
