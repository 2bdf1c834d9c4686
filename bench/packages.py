"""Installed packages that operators are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def ways(op: str, arguments: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], Callable[[], Any]]]:
    return {}
