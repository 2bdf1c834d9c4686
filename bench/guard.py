"""Ends all processes that a script started, even if the script is killed.

A small process waits until the script is gone. It then kills every process with the script's mark in its environment:
workers, their children, and the compilers that those started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

MARK = "MPLUG2_FAST_BENCH_RUN"
_QUIET_SCANS = 3
"""Consecutive scans without a find before the guard ends. A process that was just forked has no mark yet."""
_LIMIT_SECONDS = 30.0


def run(main: Callable[[], int]) -> int:
    """Runs a script's main function under a guard. Returns its exit status. SIGTERM unwinds it as Ctrl-C does."""
    watch()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def watch() -> None:
    """Marks all processes that this one starts from now on, and kills them when this one is gone. Linux only."""
    if sys.platform != "linux":
        return
    unmarked = {name: value for name, value in os.environ.items() if name != MARK}
    os.environ[MARK] = mark = f"{os.getpid()}-{time.time_ns()}"
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=unmarked,  # or the guard of an outer script would kill it
        start_new_session=True,
    )


def _kill(entry: bytes) -> bool:
    """Kills all processes with this entry in their environment. Returns whether there were any."""
    found = False
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
                found = True
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def _guard(parent: int, mark: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    ctypes.CDLL(None).prctl(1, signal.SIGUSR1)  # PR_SET_PDEATHSIG
    if os.getppid() == parent:
        signal.sigwait({signal.SIGUSR1})
    entry, quiet, end = f"{MARK}={mark}".encode(), 0, time.monotonic() + _LIMIT_SECONDS
    while quiet < _QUIET_SCANS and time.monotonic() < end:
        quiet = 0 if _kill(entry) else quiet + 1
        time.sleep(0.1)


if __name__ == "__main__":
    _guard(int(sys.argv[1]), sys.argv[2])
