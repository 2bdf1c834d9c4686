"""Charts of measured results, made to be read in print: black and grey, told apart by marks and dashes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
}
AXES = {
    "frames": "frames of a video",
    "batch": "batch (videos)",
    "resolution": "resolution (pixels a side)",
    "beams": "beams",
}
MEASURED = {"color": "black", "marker": "o", "linestyle": "-"}
# Wide and pale, so that it shows on both sides of a measured line that lies on it.
EXPECTED = {"color": "0.65", "linestyle": (0, (2, 1)), "linewidth": 3.5, "zorder": 1.5}
DEFAULT = {"color": "black", "marker": "o", "markersize": 10, "markerfacecolor": "none", "linestyle": "none"}
PROBLEM = {"color": "black", "marker": "x", "markersize": 7, "linestyle": "none", "clip_on": False}


def draw(file: File) -> None:
    raise NotImplementedError


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def scaling(results: Mapping[str, Any], path: Path) -> None:
    """Draws what `bench.scaling` measured: a column for each axis, seconds above and peak memory below."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = results["rows"]
    default = [row for row in rows if row["default"]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        grid = figure.subplots(2, len(AXES), sharex="col")
        for (axis, label), (above, below) in zip(AXES.items(), grid.T, strict=True):
            column = [row for row in rows if row["axis"] == axis]
            draw_seconds(above, column)
            draw_memory(below, column)
            below.set_xlabel(label)
            below.set_xticks([row["value"] for row in column])
            below.set_xlim(0, 1.08 * column[-1]["value"])
        grid[0, 0].set_ylabel("time (s)")
        grid[1, 0].set_ylabel("peak memory (GB)")
        figure.suptitle(
            f"Captioning with the fast model, {default[0]['dtype']}: one size varied at a time", fontsize=11
        )
        legend = [
            (Line2D([], [], **MEASURED), "measured, median; bars from the fastest to the slowest run"),
            (Line2D([], [], **EXPECTED), "needed FLOP, scaled through the default point"),
            (Line2D([], [], **DEFAULT), "default point"),
        ]
        if any(row["problem"] for row in rows):
            legend.append((Line2D([], [], **PROBLEM), "could not be run"))
        figure.legend(
            *zip(*legend, strict=True),
            loc="outside lower center",
            ncols=len(legend),
            frameon=False,
            title="Default point: " + table.title({**results, "rows": default}),
        )
        figure.savefig(path, dpi=220)


def draw_seconds(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    expected = [row for row in rows if row["expected_seconds"] is not None]
    axes.plot([row["value"] for row in expected], [row["expected_seconds"] for row in expected], **EXPECTED)
    ran = [row for row in rows if row["seconds"] is not None]
    below = [row["seconds"] - row["fastest"] for row in ran]
    above = [row["slowest"] - row["seconds"] for row in ran]
    values = [row["value"] for row in ran]
    axes.errorbar(values, [row["seconds"] for row in ran], yerr=(below, above), capsize=2.5, **MEASURED)
    finish(axes, rows, "seconds", 1)


def draw_memory(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    known = [row for row in rows if row["peak_memory_bytes"] is not None]
    axes.plot([row["value"] for row in known], [row["peak_memory_bytes"] / 1e9 for row in known], **MEASURED)
    if not known:
        axes.text(0.5, 0.5, "not known here", transform=axes.transAxes, ha="center")
    finish(axes, rows, "peak_memory_bytes", 1e9)


def finish(axes: Axes, rows: list[Mapping[str, Any]], quantity: str, unit: float) -> None:
    """A ring around the default point, its figure, a cross for what could not be run, and an origin of zero."""
    for row in rows:
        if row["default"] and row[quantity] is not None:
            axes.plot(row["value"], row[quantity] / unit, **DEFAULT)
        if row["problem"]:
            axes.plot(row["value"], 0, **PROBLEM)
    axes.set_ylim(0, 1.08 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)
