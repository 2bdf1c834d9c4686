"""A file of results that survives crashes.

A journal is a file of JSON lines. Lines that are appended together are one write. They are synced to the disk once a
second and at the end. A killed program loses no line that it wrote; a machine that loses power loses at most the last
second. An incomplete line at the end is removed when the file is opened again. A lock of the operating system, which
ends with the process, prevents two programs from writing to one file.

If somebody removes, replaces or changes the file while it is open, the next write or the end notices it: the lines are
saved to another file, and the run stops with an error.

A second file beside it (`captions.jsonl.run`) stores the settings that the results depend on. A run resumes only with
the settings it was started with, and never writes to a file that no run created.
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
"""Identifies what a line is the result of."""

SECONDS_BETWEEN_SYNCS = 1.0

MAX_LINE_BYTES = 2**30
_MAX_SETTINGS_BYTES = 2**20


class Journal:
    """A file of JSON lines, locked and open for appending.

    Args:
        path: the file. It is created if it does not exist.
        key: identifies what a line is the result of.
        settings: what the results depend on, as JSON values. They may not change once the file has lines.
        choices: numbers that are fixed when the file gets its first line.
        guarded: other files depend on the lines. Missing lines are an error then; otherwise the run starts anew.

    Raises:
        ConfigError: another process has it open, it cannot be written, it is not a journal, its lines are missing, or
            it was started with other settings.
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
        """The key of each line -> whether the line is an error."""
        self.choices: dict[str, int] = choices or {}
        """The choices in effect."""
        self.kept: dict[str, Any] = {}
        """Values that this run or an earlier one passed to `keep`."""
        try:
            self._settle()
            self._size = self._read()
            os.ftruncate(self._file, self._size)
        except OSError as error:
            os.close(self._file)
            raise ConfigError(f"{self.path}: the results cannot be read: {error.strerror}") from error
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
        """Writes the lines with new keys, in one write.

        Raises:
            MPlug2Error: they cannot be written, or another program removed, replaced or changed the file.
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
            with contextlib.suppress(OSError):  # an incomplete line is removed when the file is opened again
                os.ftruncate(self._file, self._size)
            raise MPlug2Error(f"{self.path}: the results cannot be written: {error.strerror}") from error
        self._size = size
        self.done.update((key, line["error"] is not None) for key, line in fresh.items())
        self._check_place()
        if time.monotonic() - self._synced >= SECONDS_BETWEEN_SYNCS:
            self.sync()

    def sync(self) -> None:
        """Syncs the file to the disk. Raises `MPlug2Error`."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise MPlug2Error(f"{self.path}: the results cannot be written: {error.strerror}") from error
        self._synced = time.monotonic()
        if not os.path.exists(settings_file(self.path)):
            warnings.warn(f"{settings_file(self.path)} was removed during the run and is written again", stacklevel=2)
            self._write_settings()

    def keep(self, **values: Any) -> None:
        """Stores values with the settings for the next run. Raises `MPlug2Error`."""
        self.kept |= values
        self._write_settings()

    def drop_failed(self, keys: Iterable[Hashable]) -> None:
        """Removes the lines of these keys that are errors, atomically. Raises `MPlug2Error`."""
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
        """Removes the file and its settings."""
        self._lost = True  # intended: there is nothing to save
        for path in (self.path, settings_file(self.path)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        sync_folder(self.path)

    def close(self) -> None:
        """Syncs, and releases the lock. Raises `MPlug2Error` as `append` does."""
        try:
            if not self._lost:
                self._check_place()
                self.sync()
        finally:
            os.close(self._file)

    def _settle(self) -> None:
        """Compares the settings with those that the output was started with, or writes them."""
        name = settings_file(self.path)
        with contextlib.suppress(OSError):  # left behind if a run was killed while it wrote the settings
            os.unlink(_temporary(name))
        if os.fstat(self._file).st_size == 0:
            kept: dict[str, Any] = {}
            with contextlib.suppress(ConfigError):
                kept = _read_settings(name, self.path, ())[2]
            if self._guarded and kept.get("written"):
                raise ConfigError(
                    f"{self.path} has no lines, but {name} says that a run wrote some: restore it or use another output"
                )
            self._write_settings()
            return
        old, self.choices, self.kept = _read_settings(name, self.path, self.choices)
        names = [n for n in {**old, **self._settings} if old.get(n) != self._settings.get(n)]
        if names:
            different = ", ".join(f"{n}={old.get(n)!r} (now {self._settings.get(n)!r})" for n in names)
            raise ConfigError(f"{self.path} was started with {different}. Use the original options or another output")

    def _write_settings(self) -> None:
        parts = {"settings": self._settings, "choices": self.choices} | ({"kept": self.kept} if self.kept else {})
        write_whole(settings_file(self.path), _settings_data(parts))

    def _read(self) -> int:
        """Collects the keys of the lines. Returns where the last complete line ends."""
        end = 0
        for number, data in enumerate(self._lines(), start=1):
            try:
                key, failed = self._parsed(data)
            except (ValueError, KeyError, TypeError):
                # A machine that loses power leaves zeros in blocks that were not written yet. Later lines are
                # computed again.
                if b"\0" in data or not data.endswith(b"\n"):
                    break
                raise ConfigError(
                    f"{self.path}, line {number}: this is not a result of such a run: use another file"
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
        """The key of a line, and whether it is an error. Raises if it is not a line of such a journal."""
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
        """Raises `MPlug2Error` if the path no longer leads to the file, or another program changed it."""
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
                f"{self.path} was changed by another program during the run: find out which and rerun the same command"
            )


def read_lines(path: str | os.PathLike[str]) -> Iterator[Line]:
    """The complete lines of a journal, without opening it as a `Journal`.

    Raises:
        ConfigError: it cannot be read, or a line is not a JSON object.
    """
    try:
        with open(path, "rb") as file:
            for number, data in enumerate(file, start=1):
                if data.endswith(b"\n"):
                    yield _object(data, f"{os.fspath(path)}, line {number}")
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)}: the results cannot be read: {error.strerror}") from error


def _object(data: bytes, where: str) -> Line:
    try:
        line = parsed(data)
    except ValueError as error:
        raise ConfigError(f"{where}: this is not JSON: {error}") from error
    if not isinstance(line, dict):
        raise ConfigError(f"{where}: this is not a JSON object")
    return line


def settings_file(path: str) -> str:
    """The settings file of a journal."""
    return f"{path}.run"


def _temporary(path: str | os.PathLike[str]) -> str:
    """The file that `write_whole` writes and then renames."""
    return f"{os.fspath(path)}.tmp"


def write_whole(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = True) -> None:
    """Writes a file atomically. Raises `MPlug2Error`."""
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
    """The settings, the choices and the kept values. The choices must include `numbers`."""
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
            f"{path} exists, but {name}, which every run keeps beside its output, does not: use another output"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{name}, which has the options of {path}, cannot be read: use another output") from error


def _open_locked(path: str) -> int:
    """Opens a file for appending and locks it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: the results cannot be written: {reason}") from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ConfigError(f"{path} is not a regular file, which a resumable run needs")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be locked ({error.strerror}): use an output on a file system that supports locks"
            ) from error
        # The previous owner of the lock may have removed the file.
        if not os.path.exists(path) or not os.path.samestat(os.stat(path), os.fstat(file)):
            raise BlockingIOError(errno.EAGAIN, "it was replaced")
        sync_folder(path)
    except BlockingIOError as error:
        os.close(file)
        raise ConfigError(f"{path}: another run is writing to it: wait for it, or use another output") from error
    except BaseException:
        os.close(file)
        raise
    return file
