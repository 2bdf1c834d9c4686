"""Runs functions in other processes: the one way in which the benchmark starts work.

A process starts fresh, so that its peak memory is its own, or `preloaded`: forked in milliseconds from a server that
has imported everything and computed nothing. Either way no measurement sees what another one left behind.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

MODELS = ("mplug2_fast.models.mplug2", "mplug2_fast.models.mplug")
PRELOADED = ("torch", "torch._dynamo", "torch._inductor.compile_fx", "mplug2_fast.ops", *MODELS)


class ProcessError(Exception):
    """A process failed or died. The message starts with its label."""


class Process:
    """A process that may hold an object, and that runs one function at a time.

    Use it as a context manager: an exception kills the process, a normal exit waits for it.

    Args:
        label: names the process in errors.
        make: called in the process with `arguments`. Every later function gets the result as its first argument.
        preloaded: whether to fork the process from a server instead of starting a new interpreter.
    """

    def __init__(
        self, label: str, make: Callable[..., Any] | None = None, *arguments: Any, preloaded: bool = False
    ) -> None:
        self.label = label
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, as the command line has them
        if preloaded:
            # Each process would start a pool of compiler processes and leave it behind.
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
            context: Any = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(list(PRELOADED))
        else:
            context = multiprocessing.get_context("spawn")
        self._log = tempfile.NamedTemporaryFile("r", errors="replace")  # noqa: SIM115 (closed by close)
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self._log.name, make, arguments))
        self.process.start()
        theirs.close()

    def ready(self) -> Process:
        """Waits until the process has started. Raises `ProcessError` if it could not."""
        self._receive()
        return self

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns the function's result. Function, arguments and result are pickled.

        Raises:
            ProcessError: the function raised, or the process died.
        """
        with contextlib.suppress(BrokenPipeError):  # _receive says how the process died
            self._connection.send((function, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            kind, result = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            message = f"{_how_it_ended(self.process.exitcode)}\n{self._log.read()[-2000:]}".rstrip()
        else:
            if kind == "ok":
                return result
            message, details = result
            print(details, file=sys.stderr)
        self.close()
        raise ProcessError(f"{self.label}: {message}")

    def close(self) -> None:
        self._connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.kill()
        self._log.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # nobody waits for its result
            self.kill()
        self.close()


def run(label: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the function's result from a preloaded process. Raises `ProcessError` as `Process.call` does."""
    with Process(label, preloaded=True) as process:
        return process.ready().call(function, *arguments)


def _serve(connection: Connection, log: str, make: Callable[..., Any] | None, arguments: tuple[Any, ...]) -> None:
    """Answers `(function, arguments)` with ("ok", result) or ("error", (line, traceback)) until the pipe closes."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    held: tuple[Any, ...] = ()
    try:
        if make is not None:
            held = (make(*arguments),)
        connection.send(("ok", None))
    except Exception as error:
        connection.send(("error", _described(error)))
        return
    while True:
        try:
            function, given = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("ok", function(*held, *given)))
        except Exception as error:
            connection.send(("error", _described(error)))


def _described(error: Exception) -> tuple[str, str]:
    """The error's kind with the first line that is not empty, and its traceback."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:300]}", "".join(traceback.format_exception(error))


def _how_it_ended(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "the process was killed, probably because memory ran out"
    return (
        f"the process died of {signal.Signals(-code).name}" if code and code < 0 else f"the process ended with {code}"
    )
