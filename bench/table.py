"""The table that a reader sees in the terminal, and progress while it is being measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from bench import targets
from bench.row import Results, names_of_baselines

MISSING = "–"
BASELINES = {
    "reference": "reference",
    "accelerated": "reference, accelerated",
    "fast": "fast",
    "compiled": "compiled peer",
    "uncompiled": "peer, not compiled",
}


def _shown(form: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: MISSING if value is None else form(value)


def seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def ratio(value: float) -> str:
    return f"{value:.0f}×" if value >= 100 else f"{value:.1f}×" if value >= 10 else f"{value:.2f}×"


def bound(row: Mapping[str, Any]) -> str:
    """× reference; a lower bound where the reference was timed at fewer steps than this row."""
    value = _shown(ratio)(row["x_reference"])
    return f"≥ {value}" if row.get("at_least") else value


# Column heads and how each cell is written.
COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "level": lambda row: row["level"],
    "implementation": lambda row: BASELINES[row["implementation"]] + row.get("mark", ""),
    "dtype": lambda row: row["dtype"],
    "seconds": lambda row: seconds(row["seconds"]),
    "GFLOP/s": lambda row: _shown(lambda v: f"{v:.3g}" if v < 100 else f"{v:,.0f}")(row["gflops"]),
    "% of GEMM": lambda row: _shown(lambda v: f"{v:.0f}" if v >= 10 else f"{v:.2g}")(row["percent_of_ceiling"]),
    "× reference": bound,
    "× compiled peer": lambda row: _shown(ratio)(row["x_compiled"]),
    "peak memory": lambda row: _shown(lambda v: f"{v / 1e9:.2f} GB")(row["peak_memory_bytes"]),
    "relative error": lambda row: _shown(lambda v: "0" if v == 0 else f"{v:.0e}")(row["relative_error"]),
    "backend": lambda row: row["backend"],
}


def markdown(results: Results) -> str:
    """The table alone."""
    names = names_of_baselines(results.rows)
    head = ["work", "time", "±", "TFLOP/s", "GB/s", "% of ceiling", *(f"× {name}" for name in names)]
    head += ["peak memory", "relative error", "targets", "backend"]
    lines = [head, [":---", *["---:"] * (len(head) - 3), ":---", ":---"]]
    for row in results.rows:
        percent = _shown(lambda v: f"{v:.0f}% {row.bound}")(row.percent_of_ceiling)  # noqa: B023
        lines.append(
            [
                f"{row.key.level} · {row.key}",
                f"{seconds(row.seconds)} s",
                _shown(lambda v: f"{v:.0%}")(row.spread),
                _shown(lambda v: f"{v:.3g}")(row.tflops),
                _shown(lambda v: f"{v:.3g}")(row.gb_per_second),
                percent,
                *(_shown(ratio)(row.ratio(name)) for name in names),
                _shown(lambda v: f"{v / 1e9:.2f} GB")(row.peak_memory_bytes),
                _shown(lambda v: f"{v:.0e}")(row.relative_error),
                "; ".join(f"{each.target.wanted}: {each.verdict}" for each in targets.of(row, results.ceilings)),
                row.backend,
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def marked(rows: list[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """The rows, with a mark at a reference that did less work than the others, and the mark's meaning."""
    names = {row["level"]: row["name"] for row in rows if row["implementation"] == "reference"}
    less = {row["level"] for row in rows if names.get(row["level"], row["name"]) != row["name"]}
    if not less:
        return [dict(row) for row in rows], None
    result = [
        {**row, **({"mark": " *"} if row["implementation"] == "reference" else {"at_least": True})}
        if row["level"] in less
        else dict(row)
        for row in rows
    ]
    steps = next(names[level] for level in names if level in less)
    return result, f"* Timed at fewer steps ({steps}); nothing is extrapolated: × reference is a lower bound."


def title(results: Mapping[str, Any]) -> str:
    """What was measured, on what."""
    machine, versions = results["machine"], results["versions"]
    name = next(row["name"] for row in results["rows"] if row["level"] != "loading")
    where = machine["gpu"] if results["rows"][-1]["device"].startswith("cuda") else machine["cpu"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{name} · {where}, {threads} · torch {versions['torch']}"


def ceilings(results: Mapping[str, Any]) -> str:
    found = results["ceilings"]
    rates = [f"{dtype} {rate['gflops']:,.0f} GFLOP/s ({rate['operator']})" for dtype, rate in found["gemm"].items()]
    return f"Best GEMM in this run: {', '.join(rates)}; copy {found['copy_gb_per_second']:,.0f} GB/s."


def show(results: Mapping[str, Any], notes: list[str]) -> None:
    """Prints the table on stdout."""
    console = Console() if sys.stdout.isatty() else Console(width=160)
    rows, meaning = marked(results["rows"])
    table = Table(title=title(results), title_justify="left")
    for head in COLUMNS:
        text = head in ("level", "implementation", "dtype", "backend")
        table.add_column(head, justify="left" if text else "right")
    level = None
    for row in rows:
        if level not in (None, row["level"]):
            table.add_section()
        level = row["level"]
        table.add_row(*(cell(row) for cell in COLUMNS.values()))
    console.print(table)
    for note in filter(None, [meaning, ceilings(results), *notes]):
        console.print(Text(note))


class TerminalProgress:
    """What is being measured, on stderr: a live line on a terminal, and a line for what took long."""

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
        self.console.print(Text(f"{what}: {seconds:.3g} s"), highlight=False)
