"""Plain tables without rules, as wide as the terminal; without a terminal, lines are not folded."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from mplug2_fast.cli.console import shown


def names_and_values(rows: Iterable[Sequence[str]]) -> str:
    """One row per line: names, then a value. Long values are folded within their column."""
    return _render(None, [*rows])


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a header. The columns `entries` and `parameters` are right-aligned."""
    return _render(header, [*rows])


def _render(header: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=header is not None, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in header or [""] * len(rows[0]):
        table.add_column(name, overflow="fold", justify="right" if name in ("entries", "parameters") else "left")
    for name, *values in rows:
        table.add_row(Text(shown(name), style="bold"), *(Text(shown(value)) for value in values))
    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))
