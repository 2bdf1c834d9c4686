"""Rows as a table, on the terminal, in Markdown and as CSV."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import machine, targets
from bench.row import COMPARED, Results, Row, names_of_baselines

MISSING = "–"
TEXT = ("work", "sizes", "dtype", "vs. bound", "target", "backend")

Column = Callable[[Row], str]


def seconds(value: float) -> str:
    """With a suitable unit."""
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("µs", 1e6)
    return f"{figure(factor * value)} {unit}"


def ratio(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.0f}×" if value >= 100 else f"{value:.1f}×" if value >= 10 else f"{value:.2f}×"


def figure(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def work(row: Row) -> str:
    return row.key.name + ("" if row.key.direction == "forward" else f", {row.key.direction}")


def ceiling(row: Row) -> str:
    return MISSING if row.percent_of_ceiling is None else f"{figure(row.percent_of_ceiling)} {row.bound}"


def tokens(row: Row) -> str:
    return MISSING if row.tokens is None else figure(row.tokens / row.seconds)


def recomputed(row: Row) -> str:
    """What checkpointing adds to the needed operations."""
    return f"+{100 * row.recomputed_flop / row.flop:.0f}%" if row.recomputed_flop and row.flop else MISSING


def bounds(row: Row) -> str:
    """The ratios to what bounds the work."""
    bounds = [f"{ratio(b.ratio)} {name}" for name, b in row.baselines.items() if name not in COMPARED]
    return ", ".join(bounds) or MISSING


def size(value: int) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def memory(row: Row) -> str:
    """The peak, and the part that the call added."""
    if row.peak_memory_bytes is None:
        return MISSING
    added = "" if row.added_memory_bytes is None else f" (+{size(row.added_memory_bytes)})"
    return size(row.peak_memory_bytes) + added


def error(row: Row) -> str:
    if row.relative_error is None:
        return MISSING if row.correct else "WRONG"
    text = "0" if row.relative_error == 0 else f"{row.relative_error:.0e}"
    return text if row.correct else f"WRONG: {text} > {row.allowed_error:.0e}"


def columns(rows: list[Row], ceilings: Mapping[str, Any]) -> dict[str, Column]:
    """Column head -> the text of a cell. Baselines that no row has are skipped."""

    def target(row: Row) -> str:
        return "; ".join(str(judged) for judged in targets.of(row, ceilings)) or MISSING

    present = [name for name in names_of_baselines(rows) if name in COMPARED]
    bounded = any(name not in COMPARED for row in rows for name in row.baselines)
    all_columns: dict[str, Column | None] = {
        "work": work,
        "sizes": lambda row: row.key.sizes,
        "dtype": lambda row: row.key.dtype,
        "time": lambda row: seconds(row.seconds),
        "±": lambda row: MISSING if row.spread is None else f"{100 * row.spread:.0f}%",
        "TFLOP/s": lambda row: figure(row.tflops),
        "GB/s": lambda row: figure(row.gb_per_second),
        "tokens/s": tokens if any(row.tokens for row in rows) else None,
        "recomputed": recomputed if any(row.recomputed_flop for row in rows) else None,
        "% of ceiling": ceiling,
        **{f"× {name}": lambda row, name=name: ratio(row.ratio(name)) for name in present},
        "vs. bound": bounds if bounded else None,
        "target": target if any(targets.of(row, ceilings) for row in rows) else None,
        "peak memory": memory,
        "relative error": error,
        "backend": lambda row: row.backend,
    }
    return {head: cell for head, cell in all_columns.items() if cell is not None}


def ceilings(results: Results) -> str:
    found = results.ceilings
    rates = [f"{dtype} {rate['gflops']:,.0f} GFLOP/s ({rate['operator']})" for dtype, rate in found["gemm"].items()]
    return f"Ceilings, measured in this run: {', '.join(rates)}; copy {found['copy_gb_per_second']:,.0f} GB/s."


def markdown(results: Results) -> str:
    """The table, the machine and the ceilings."""
    shown = columns(results.rows, results.ceilings)
    lines = [
        " | ".join(shown),
        " | ".join(":---" if head in TEXT else "---:" for head in shown),
        *(" | ".join(cell(row) for cell in shown.values()) for row in results.rows),
    ]
    return (
        "\n".join(f"| {line} |" for line in lines)
        + f"\n\n{machine.words(results.machine, results.versions)}. {ceilings(results)}\n"
    )


def show(results: Results) -> None:
    """Prints one table per level, then the commands that measure each row again."""
    console = Console(width=max(Console().width, 200))
    for level, group in itertools.groupby(results.rows, lambda row: row.key.level):
        rows = list(group)
        shown = columns(rows, results.ceilings)
        table = Table(title=f"{level} · {machine.words(results.machine, results.versions)}", title_justify="left")
        for head in shown:
            table.add_column(head, justify="left" if head in TEXT else "right")
        for row in rows:
            style = None if row.correct else "bold red"
            table.add_row(*(cell(row) for cell in shown.values()), style=style)
        console.print(table)
    for text in (ceilings(results), *results.notes, "Each row again:", *(row.command for row in results.rows)):
        console.print(Text(text), soft_wrap=True)


def write_csv(results: Results, path: Path) -> None:
    """One line per row, with everything in the JSON."""
    rows = [row.flat() for row in results.rows]
    heads = dict.fromkeys(head for row in rows for head in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(heads), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
