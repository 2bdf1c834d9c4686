"""Saves the lines of an output file that was removed, replaced or moved during a run."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator

_COPIED_AT_ONCE = 2**20


def rescue(file: int, path: str, settings_file: Callable[[str], str], settings: bytes) -> str:
    """Saves the contents of an open file that its path no longer leads to. Returns a message that says what happened.

    The lines go back to the path if it is free, otherwise to `captions.jsonl.recovered` beside it. If the folder was
    removed, they go to the nearest existing folder above.

    Args:
        file: open for reading. path: its former path.
        settings_file: returns the path of the settings for an output. settings: written beside the lines, so that a run
            can resume.
    """
    if moved := _new_name(file):
        return f"{path} was moved to {moved} during the run: move it back and rerun the same command"
    happened = f"{path} was removed or replaced during the run"
    reason = "there is no folder to write to"
    for target in _targets(path):
        try:
            _copy(file, target)
            if not os.path.exists(settings_file(target)):
                with open(settings_file(target), "wb") as beside:
                    beside.write(settings)
        except OSError as error:
            reason = error.strerror
            continue
        if target == path:
            return f"{happened}: its lines were written there again. Rerun the same command to resume"
        return f"{happened}: its lines are in {target} now. Use that as the output to resume"
    return f"{happened}, and its lines cannot be saved: {reason}"


def rename_new(temporary: str, path: str | os.PathLike[str]) -> None:
    """Renames a file. Raises `FileExistsError` instead of replacing an existing file."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path)) from None
        os.rename(temporary, path)
    else:
        os.unlink(temporary)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Syncs the folder of a file, which holds its name, if the folder and the file system allow it."""
    try:
        folder = os.open(os.path.dirname(os.fspath(path)) or ".", os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


def _new_name(file: int) -> str | None:
    """The current path of an open file, or None if it was removed."""
    name = os.readlink(f"/proc/self/fd/{file}")
    try:
        return name if os.path.samestat(os.stat(name), os.fstat(file)) else None
    except OSError:
        return None


def _targets(path: str) -> Iterator[str]:
    """Free paths for the lines, best first."""
    try:
        folder = os.path.dirname(os.path.abspath(path))
    except OSError:  # the current folder was removed
        folder = ""
    if os.path.isdir(folder) and not os.path.lexists(path):
        yield path
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    for place in dict.fromkeys((folder, tempfile.gettempdir())):
        if place:
            name = os.path.join(place, f"{os.path.basename(path)}.recovered")
            numbered = (f"{name}-{number}" for number in itertools.count(1))
            yield next(free for free in itertools.chain([name], numbered) if not os.path.lexists(free))


def _copy(file: int, target: str) -> None:
    """Copies a file to a free path."""
    descriptor, temporary = tempfile.mkstemp(prefix=f"{os.path.basename(target)}.", dir=os.path.dirname(target) or ".")
    try:
        with open(descriptor, "wb") as copy:
            os.fchmod(descriptor, os.fstat(file).st_mode & 0o777)
            position = 0
            while data := os.pread(file, _COPIED_AT_ONCE, position):
                copy.write(data)
                position += len(data)
            copy.flush()
            os.fsync(descriptor)
        rename_new(temporary, target)
        sync_folder(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
