"""Reports what is being measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text


class Progress:
    """Reports nothing."""

    def begin(self, what: str) -> None:
        pass

    def finished(self, what: str, seconds: float) -> None:
        pass

    def timed(self, what: str, work: Callable[[], Any]) -> Any:
        """The result of `work`."""
        self.begin(what)
        start = time.perf_counter()
        result = work()
        self.finished(what, time.perf_counter() - start)
        return result


class TerminalProgress(Progress):
    """Writes to stderr: a live line on a terminal, and a line for each measurement that took long."""

    LONG_SECONDS = 2.0

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.status = Status("", console=self.console)

    def __enter__(self) -> TerminalProgress:
        if self.console.is_terminal:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def begin(self, what: str) -> None:
        self.status.update(Text(what))

    def finished(self, what: str, seconds: float) -> None:
        if seconds >= self.LONG_SECONDS:
            self.console.print(Text(f"{what}: {seconds:.3g} s"), highlight=False)
