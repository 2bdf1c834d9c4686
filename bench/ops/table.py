"""The table of operators on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.table import MISSING, ceilings, ratio

TEXT = ("operator", "sizes", "dtype", "held against", "target", "backend")


def _held(row: Mapping[str, Any]) -> str:
    return MISSING if row["baseline"] is None else f"{row['x_baseline']:.2f}× {row['baseline']}"


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "operator": lambda row: row["op"],
    "sizes": lambda row: row["sizes"],
    "dtype": lambda row: row["dtype"],
    "ms": lambda row: f"{row['milliseconds']:.3g}",
    "±": lambda row: f"{100 * row['spread']:.0f}%",
    "GFLOP/s": lambda row: f"{row['gflops']:.0f}",
    "GB/s": lambda row: f"{row['gb_per_second']:.1f}",
    "× eager": lambda row: ratio(row["x_eager"]),
    "× torch": lambda row: ratio(row["x_torch"]),
    "× compiled": lambda row: MISSING if row["x_compiled"] is None else ratio(row["x_compiled"]),
    "held against": _held,
    "target": lambda row: row["target"] or MISSING,
    "relative error": lambda row: "0" if row["relative_error"] == 0 else f"{row['relative_error']:.0e}",
    "backend": lambda row: row["backend"],
}


def title(results: Mapping[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    cuda = machine.get("device", "cpu").startswith("cuda")
    where = machine["gpu"] if cuda else f"{machine['cpu']}, {machine['threads']} threads"
    return f"operators · {where} · torch {versions['torch']}"


def markdown(results: Mapping[str, Any]) -> str:
    lines = [
        " | ".join(COLUMNS),
        " | ".join(":---" if head in TEXT else "---:" for head in COLUMNS),
        *(" | ".join(cell(row) for cell in COLUMNS.values()) for row in results["rows"]),
    ]
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{title(results)}. {ceilings(results)}\n"


def show(results: Mapping[str, Any]) -> None:
    console = Console(width=max(Console().width, 170))
    table = Table(title=title(results), title_justify="left")
    for head in COLUMNS:
        table.add_column(head, justify="left" if head in TEXT else "right")
    for row in results["rows"]:
        table.add_row(*(cell(row) for cell in COLUMNS.values()))
    console.print(table)
    console.print(Text(ceilings(results)))
