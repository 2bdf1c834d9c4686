"""A function in a fresh process, so that no measurement finds what another left behind. It is forked from one that has
imported everything and computed nothing, and starts in milliseconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")
PRELOADED = ("torch", "torch._dynamo", "torch._inductor.compile_fx", "mplug2_fast.ops", "mplug2_fast.models.mplug2")


class ChildError(Exception):
    """What went wrong in the other process, in its own words."""


def call(function: Callable[..., T], *arguments: Any) -> T:
    """The function's result. Function, arguments and result are pickled.

    Raises:
        ChildError: it raised, or its process died.
    """
    # The compiler's pool of processes would be started, and left behind, by every single one.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # As the command line has it, for all that is compared.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        with contextlib.suppress(EOFError):
            kind, result = ours.recv()
            if kind == "ok":
                return result
            raise ChildError(result)
        process.join()
        raise ChildError(_how_it_ended(process.exitcode))
    except (KeyboardInterrupt, SystemExit):  # the other process does not hear of them
        process.kill()
        raise
    finally:
        process.join(timeout=10)
        if process.is_alive():  # it has answered, but something of it does not end
            process.kill()
            process.join()
        ours.close()


def _run(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = ("ok", function(*arguments))
    except Exception as error:
        traceback.print_exc()
        answer = ("error", f"{type(error).__name__}: {error}")
    connection.send(answer)
    connection.close()


def _how_it_ended(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed, most likely for want of memory"
    return (
        f"its process died of {signal.Signals(-code).name}" if code and code < 0 else f"its process ended with {code}"
    )
