"""Shared by all commands: one-line errors and warnings, progress, and what happens when the reader closes the pipe."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import typer

from mplug2_fast.errors import MPlug2Error

BAD_INPUT, INTERRUPTED, READER_GONE = 2, 130, 141


@contextmanager
def reporting() -> Iterator[None]:
    """Turns errors that a user can fix into a message and an exit status."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
            yield
            sys.stdout.flush()
    except MPlug2Error as error:
        note(f"error: {error}", lines=True)
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    except OutputError as error:
        raise typer.Exit(output_failed(error)) from error


class OutputError(OSError):
    """Standard output cannot be written to."""


class Output(io.TextIOWrapper):
    """Standard output. Its errors are `OutputError`s, to distinguish them from errors of other files."""

    def write(self, text: str) -> int:
        with _as_output_error():
            return super().write(text)

    def flush(self) -> None:
        with _as_output_error():
            super().flush()


def emit(line: str) -> None:
    """Prints one line of results and flushes it."""
    with _as_output_error():
        print(line, flush=True)


def note(message: str, *, lines: bool = False) -> None:
    """Prints a message on standard error: on one line, or on several with `lines`.

    Control characters are escaped, so that a file name cannot control the terminal. Errors of standard error itself are
    ignored.
    """
    parts = message.split("\n") if lines else [" ".join(message.split())]
    with contextlib.suppress(OSError):
        print("\n".join(map(shown, parts)), file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """A text on one line and in one column: control characters are escaped."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


@contextmanager
def _as_output_error() -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(error.errno, error.strerror) from error


def output_failed(error: OutputError) -> int:
    """Reports what is wrong with standard output. Returns the exit status."""
    _discard_output()
    if error.errno == errno.EPIPE:
        return READER_GONE
    reason = "standard output is closed" if error.errno == errno.EBADF else error.strerror
    note(f"error: the results cannot be written: {reason}")
    return BAD_INPUT


def waiting(what: str) -> AbstractContextManager[object]:
    """Shows a message while the block runs, if standard error is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(what))


def _discard_output() -> None:
    """Prevents a second error when Python flushes standard output at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_streams() -> None:
    """Prepares standard output and error for file names with arbitrary bytes, which are printed unchanged.

    First opens streams that the caller closed. Otherwise the next opened file would get the stream's descriptor, and
    output of libraries would go into that file.
    """
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # gets the lowest free descriptor
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)  # writing to it fails
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        buffering = {"line_buffering": sys.stdout.line_buffering, "write_through": sys.stdout.write_through}
        encoding = sys.stdout.encoding
        sys.stdout = Output(sys.stdout.detach(), encoding, _errors(encoding), **buffering)
    sys.stderr.reconfigure(errors=_errors(sys.stderr.encoding))


def _errors(encoding: str) -> str:
    return "surrogateescape" if encoding.lower() == "utf-8" else "backslashreplace"
