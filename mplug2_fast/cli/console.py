"""What every command shares: errors and warnings of one line each, progress, and a reader that goes away."""

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
    """Turn the errors that a user can do something about into a message and an exit status."""
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
    """Standard output. What goes wrong with it is an `OutputError`, which is not one of another file."""

    def write(self, text: str) -> int:
        with _as_output_error():
            return super().write(text)

    def flush(self) -> None:
        with _as_output_error():
            super().flush()


def emit(line: str) -> None:
    """Print one line of results, at once."""
    with _as_output_error():
        print(line, flush=True)


def note(message: str, *, lines: bool = False) -> None:
    """Print a message on standard error; on one line, unless it is a report of several `lines`.

    Control characters are written as escapes: a file must not speak to the terminal. Nothing is done about a standard
    error that cannot be written to, which is no reason to stop.
    """
    parts = message.split("\n") if lines else [" ".join(message.split())]
    with contextlib.suppress(OSError):
        print("\n".join(map(shown, parts)), file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """A text that stays on one line and in one column: control characters are written as escapes."""
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
    """Say what is wrong with standard output; the exit status."""
    _discard_output()
    if error.errno == errno.EPIPE:
        return READER_GONE
    reason = "standard output is closed" if error.errno == errno.EBADF else error.strerror
    note(f"error: the results cannot be written: {reason}")
    return BAD_INPUT


def waiting(what: str) -> AbstractContextManager[object]:
    """Say what is being waited for, while it is, if somebody looks at standard error."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(what))


def _discard_output() -> None:
    """Python flushes standard output once more when it exits, and would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_streams() -> None:
    """Make standard output and error ready for results: file names may hold any bytes, which come back as they were.

    A stream that the caller closed is put in order first: otherwise the next file that is opened gets its number, and
    what libraries print there would go into that file.
    """
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest number that is free
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)  # not to be written to, as its user finds out
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        buffering = {"line_buffering": sys.stdout.line_buffering, "write_through": sys.stdout.write_through}
        encoding = sys.stdout.encoding
        sys.stdout = Output(sys.stdout.detach(), encoding, _errors(encoding), **buffering)
    sys.stderr.reconfigure(errors=_errors(sys.stderr.encoding))


def _errors(encoding: str) -> str:
    return "surrogateescape" if encoding.lower() == "utf-8" else "backslashreplace"
