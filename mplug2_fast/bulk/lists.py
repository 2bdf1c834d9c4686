"""Reads text files that users write (lists of videos, questions, candidates): line by line, within limits."""

from __future__ import annotations

import codecs
import errno
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from mplug2_fast.errors import ConfigError

MAX_LINES = 20_000_000
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def lines_of(path: str, what: str, *, max_bytes: int) -> Iterator[bytes]:
    """The lines of a file, without line ends and byte order mark.

    Args:
        path: a regular file, an open pipe, or `-` for standard input.
        what: what the file should be, for error messages: "a list of videos".
        max_bytes: maximum size of a line.

    Raises:
        ConfigError: the file cannot be read, is not text, or is too large.
    """
    with _opened(path, what) as file:
        number = 0
        while data := _line(file, path, max_bytes):
            number += 1
            where = f"{path}, line {number}"
            if number == 1 and data[:2] in _UTF16:
                raise ConfigError(f"{path}: this is UTF-16 text: save it as UTF-8")
            if b"\0" in data:
                raise ConfigError(f"{where}: it has a NUL byte: {what} must be UTF-8 text")
            if len(data) > max_bytes:
                raise ConfigError(f"{where}: it is longer than {max_bytes:,} bytes: this is not {what}")
            if number > MAX_LINES:
                raise ConfigError(f"{path}: it has more than {MAX_LINES:,} lines: split it")
            yield data.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")


def parsed(text: str | bytes) -> Any:
    """Parses JSON. Raises `ValueError` for anything else, including brackets that are nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def _line(file: BinaryIO, path: str, max_bytes: int) -> bytes:
    try:
        return file.readline(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{path}: the file cannot be read: {error.strerror}") from error


@contextmanager
def _opened(path: str, what: str) -> Iterator[BinaryIO]:
    if path == "-":
        if sys.stdin is None:
            raise ConfigError("-: standard input is closed")
        yield sys.stdin.buffer
        return
    try:
        file = open_regular(path, pipes=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: {what} cannot be read: {reason}") from error
    with file:
        yield file


def open_regular(path: str, *, pipes: bool = False) -> BinaryIO:
    """Opens a regular file for reading, or with `pipes` an open pipe. Reading from anything else may never end.

    Raises:
        OSError, ValueError: it cannot be opened, or is something else.
    """
    # Without O_NONBLOCK, opening a named pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        is_open_pipe = stat.S_ISFIFO(mode) and os.readlink(f"/proc/self/fd/{descriptor}").startswith("pipe:")
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, "it is a folder")
        if not stat.S_ISREG(mode) and not (pipes and is_open_pipe):
            raise OSError(errno.EINVAL, "it is not a regular file; use - to read a list from standard input")
        os.set_blocking(descriptor, True)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
