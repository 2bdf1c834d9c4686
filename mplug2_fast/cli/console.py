"""What every command shares: errors and warnings of one line each, progress, and a reader that goes away."""

from __future__ import annotations

import errno
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
    except OSError as error:
        if not isinstance(error, _OutputError):
            raise
        _discard_output()
        if error.errno == errno.EPIPE:
            raise typer.Exit(READER_GONE) from error
        note(f"error: the results cannot be written: {error.strerror}")
        raise typer.Exit(BAD_INPUT) from error


class _OutputError(OSError):
    """Standard output cannot be written to."""


def emit(line: str) -> None:
    """Print one line of results, at once."""
    try:
        print(line, flush=True)
    except OSError as error:
        raise _OutputError(error.errno, error.strerror) from error


def note(message: str, *, lines: bool = False) -> None:
    """Print a message on standard error; on one line, unless it is a report of several `lines`."""
    print(message if lines else " ".join(message.split()), file=sys.stderr, flush=True)


def shown(path: str) -> str:
    """A file name that stays on one line and in one column: control characters are written as escapes."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], path)


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
