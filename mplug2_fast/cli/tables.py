"""Plain tables without rules, as wide as the terminal, or as wide as they need to be where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from mplug2_fast.cli.console import shown


def names_and_values(rows: Iterable[Sequence[str]]) -> str:
    """Names and, last, a value a line; long values are folded under themselves."""
    return _render(None, [*rows])


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a header; the columns named after a count are right-aligned."""
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
