"""What is being measured, told while it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def begin(self, what: str) -> None: ...

    def finished(self, what: str, seconds: float) -> None: ...
