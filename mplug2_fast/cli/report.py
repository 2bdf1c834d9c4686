"""`mplug2-fast info`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from mplug2_fast.cli.console import emit, reporting
from mplug2_fast.cli.tables import names_and_values


def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show what is installed.

    Prints versions, devices, which native parts are installed, what is missing, and how to fix it.
    """
    with reporting():
        from mplug2_fast.info import collect

        found = collect()
        emit(json.dumps(found, indent=2) if as_json else names_and_values(_rows(found)))


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(part, name, value) of each line. Only the first line of a part has its name."""
    for part, values in found.items():
        shown = part
        for name, value in _flat(values):
            yield shown, name, value
            shown = ""


def _flat(value: Any, key: str = "", name: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of every leaf of a value."""
    if isinstance(value, dict):
        for inner, item in value.items():
            yield from _flat(item, inner, f"{name} {inner}".strip())
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, item in enumerate(value):
            yield from _flat(item, key, f"{key.removesuffix('s')} {index}")
    else:
        yield name, _text(key, value)


def _text(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    if key in ("total", "available", "memory") and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB"
    return "none" if value is None else str(value)
