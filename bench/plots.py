"""Charts of results for print: black and grey, with marks and dashes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import machine
from bench.row import EIGHT_BIT, Results, Row, on_roofline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
# Wide and pale, so that it shows on both sides of a measured line on top of it.
EXPECTED = {"color": "0.65", "linestyle": (0, (2, 1)), "linewidth": 3.5, "zorder": 1.5}
DEFAULT = {"color": "black", "marker": "o", "markersize": 10, "markerfacecolor": "none", "linestyle": "none"}
PROBLEM = {"color": "black", "marker": "x", "markersize": 7, "linestyle": "none", "clip_on": False}

MARKS = {
    "float32": {"marker": "o", "markerfacecolor": "black"},
    "bfloat16": {"marker": "s", "markerfacecolor": "white"},
    "float16": {"marker": "^", "markerfacecolor": "0.6"},
}
CEILINGS = {
    "float32": "-",
    "bfloat16": (0, (5, 2)),
    "float16": (0, (1, 1.5)),
    **dict.fromkeys(EIGHT_BIT, (0, (5, 1, 1, 1))),
}


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(kind: str, results: Any, path: Path) -> None:
    """Draws results of a kind of `bench.committed.File`. Raises `ValueError` if there is nothing to draw."""
    {"rows": roofline, "waterfall": waterfall, "scaling": scaling}[kind](results, path)


def save(figure: Figure, path: Path) -> None:
    """Writes the same bytes for the same figures."""
    figure.savefig(path, dpi=200, metadata={"Software": None})


def scaling(results: Mapping[str, Any], path: Path) -> None:
    """Draws results of `bench.scaling`: a column per axis, seconds above and peak memory below."""
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
            (Line2D([], [], **MEASURED), "measured: median, fastest and slowest run"),
            (Line2D([], [], **EXPECTED), "needed FLOP, scaled through the default point"),
            (Line2D([], [], **DEFAULT), "default point"),
        ]
        if any(row["problem"] for row in rows):
            legend.append((Line2D([], [], **PROBLEM), "could not run"))
        figure.legend(
            *zip(*legend, strict=True),
            loc="outside lower center",
            ncols=len(legend),
            frameon=False,
            title=f"Default point: {default[0]['name']} · {machine.words(results['machine'], results['versions'])}",
        )
        save(figure, path)


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
    """Adds a ring around the default point, a cross for each problem, and an origin of zero."""
    for row in rows:
        if row["default"] and row[quantity] is not None:
            axes.plot(row["value"], row[quantity] / unit, **DEFAULT)
        if row["problem"]:
            axes.plot(row["value"], 0, **PROBLEM)
    axes.set_ylim(0, 1.08 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)


def roofline(results: Results, path: Path) -> None:
    """Draws the rates of `on_roofline` against FLOP per byte, under both ceilings of their run. A grey line joins the
    dtypes of a work. Raises `ValueError` if there are no rows."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = on_roofline(results.rows)
    if not rows:
        raise ValueError("nothing to draw: no row has both FLOP and bytes")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.8), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("needed FLOP per byte")
        axes.set_ylabel("needed GFLOP/s")
        axes.grid(which="minor", visible=False)
        points = draw_works(axes, rows)
        draw_ceilings(axes, results, {row.key.dtype for row in rows}, points)
        works = ", ".join([*dict.fromkeys(row.key.level for row in rows), *common_sizes(rows)])
        axes.set_title(f"{works} · {machine.words(results.machine, results.versions)}", fontsize=10)
        axes.legend(loc="lower right", frameon=False)
        FigureCanvasAgg(figure).draw()  # places what the labels must not cover
        label(axes, points)
        save(figure, path)


def draw_works(axes: Axes, rows: list[Row]) -> dict[str, list[tuple[float, float]]]:
    """Draws a mark per row. Returns the name of a work -> its points, the fastest first."""
    names = short_names(rows)
    works: dict[str, list[tuple[float, float]]] = {}
    for row, name in zip(rows, names, strict=True):
        works.setdefault(name, []).append((row.flop / row.bytes, row.flop / row.seconds / 1e9))
    for points in works.values():
        axes.plot(*zip(*points, strict=True), color="0.75", linewidth=0.8, zorder=1.5)
    for dtype, mark in MARKS.items():
        found = [(row.flop / row.bytes, row.flop / row.seconds / 1e9) for row in rows if row.key.dtype == dtype]
        if found:
            axes.plot(*zip(*found, strict=True), color="black", linestyle="none", label=dtype, zorder=3, **mark)
    return {name: sorted(points, key=lambda point: -point[1]) for name, points in works.items()}


def common_sizes(rows: list[Row]) -> list[str]:
    """The parts of the sizes that all rows share."""
    first, *others = (row.key.sizes.split(", ") for row in rows)
    return [part for part in first if all(part in other for other in others)]


def short_names(rows: list[Row]) -> list[str]:
    """Names and sizes without the parts that all rows share."""
    common = common_sizes(rows)
    return [
        ", ".join([row.key.name.replace("_", " "), *(part for part in row.key.sizes.split(", ") if part not in common)])
        for row in rows
    ]


def draw_ceilings(axes: Axes, results: Results, dtypes: set[str], points: Mapping[str, Any]) -> None:
    """Draws a slope for the copy and a level line per dtype for its matrix products."""
    copy = results.ceilings["copy_gb_per_second"]
    rates = {dtype: found["gflops"] for dtype, found in results.ceilings["gemm"].items() if dtype in dtypes}
    xs = [x for each in points.values() for x, _ in each]
    ys = [y for each in points.values() for _, y in each]
    left, right = min(xs) / 2, max([*xs, *(rate / copy for rate in rates.values())]) * 4
    top = max(rates.values(), default=max(ys))
    axes.set_xlim(left, right)
    axes.set_ylim(min([*ys, left * copy]) / 2, top * 2.2)
    knee = top / copy
    axes.plot([left, knee], [left * copy, top], color="0.35", linewidth=1.3, zorder=1)
    axes.annotate(
        f"copy {copy:,.0f} GB/s",
        (knee / 2, top / 2),
        textcoords="offset points",
        xytext=(-8, 2),
        ha="right",
        fontsize=8,
        color="0.35",
    )
    for dtype, rate in rates.items():
        axes.plot([rate / copy, right], [rate, rate], color="0.35", linestyle=CEILINGS[dtype], linewidth=1.3, zorder=1)
        axes.annotate(
            f"GEMM {dtype} {rate:,.0f} GFLOP/s",
            (right, rate),
            textcoords="offset points",
            xytext=(-2, 3),
            ha="right",
            fontsize=8,
            color="0.35",
        )


PLACES = [
    (scale * x, scale * y, ha)
    for scale in (1, 2, 3, 4.5, 6)
    for x, y, ha in (
        (7, 0, "left"),
        (-7, 0, "right"),
        (0, 8, "center"),
        (0, -8, "center"),
        (6, 7, "left"),
        (6, -7, "left"),
        (-6, 7, "right"),
        (-6, -7, "right"),
    )
]
"""Positions of a label, in points from its mark, the nearest first."""


def label(axes: Axes, works: Mapping[str, list[tuple[float, float]]]) -> None:
    """Writes each name beside its fastest mark, in the first place where it covers no mark and no other name."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    taken = [extent(text, renderer) for text in axes.texts]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(renderer))
    for points in works.values():
        for x, y in axes.transData.transform(points):
            taken.append(Bbox.from_extents(x - 4, y - 4, x + 4, y + 4))
    for name, points in sorted(works.items(), key=lambda work: work[1][0]):
        best = None
        for x, y, ha in PLACES:
            text = axes.annotate(
                name,
                points[0],
                textcoords="offset points",
                xytext=(x, y),
                ha=ha,
                va="center",
                fontsize=7.5,
                path_effects=[withStroke(linewidth=2, foreground="white")],
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
                if abs(x) + abs(y) > 14
                else None,
            )
            box = extent(text, renderer)
            overlap = sum(area(box, other) for other in taken) + box.width * box.height - area(box, frame)
            if best is None or overlap < best[0]:
                if best is not None:
                    best[1].remove()
                best = overlap, text, box
            else:
                text.remove()
            if overlap == 0:
                break
        assert best is not None
        taken.append(best[2])


def extent(annotation: Any, renderer: Any) -> Any:
    """The box of a label without its line."""
    from matplotlib.text import Text

    annotation.update_positions(renderer)
    return Text.get_window_extent(annotation, renderer)


def area(first: Any, second: Any) -> float:
    """The area that two boxes share."""
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return width * height if width > 0 and height > 0 else 0.0


def waterfall(results: Mapping[str, Any], path: Path) -> None:
    """Draws results of `bench.waterfall`: a bar of time per technique, with columns of figures beside it."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = results["rows"]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(11, 1.5 + 0.34 * len(rows)), layout="constrained")
        bars, columns = figure.subplots(1, 2, sharey=True, width_ratios=(5, 4.8))
        seconds = [row["seconds"] for row in rows]
        left = min(seconds) / 2
        lengths = [value - left for value in seconds]
        bars.barh(range(len(rows)), lengths, left=left, height=0.6, color="0.75", edgecolor="black", linewidth=0.8)
        bars.set_xscale("log")
        bars.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bars.xaxis.set_minor_formatter(NullFormatter())
        bars.set_xlim(left, max(seconds) * 1.05)
        bars.xaxis.set_major_formatter("{x:g}")
        bars.set_ylim(len(rows) - 0.5, -0.5)
        bars.set_yticks(range(len(rows)), [row["technique"] for row in rows])
        bars.tick_params(axis="y", length=0)
        bars.set_xlabel("time of one video (s, logarithmic)")
        columns.set_axis_off()
        for column, (head, cell) in enumerate(WATERFALL.items(), start=1):
            x = column / len(WATERFALL)
            columns.text(x, -0.7, head, transform=columns.get_yaxis_transform(), ha="right", fontsize=8)
            for place, row in enumerate(rows):
                columns.text(x, place, cell(row), transform=columns.get_yaxis_transform(), ha="right", va="center")
        figure.suptitle(machine.words(results["machine"], results["versions"]), fontsize=10)
        save(figure, path)


def figure_of(form: str, value: float | None) -> str:
    return "–" if value is None else form.format(value)


WATERFALL = {
    "time": lambda row: figure_of("{:.3g} s", row["seconds"]),
    "× official": lambda row: figure_of("{:.2f}×", row["x_released"]),
    "× above": lambda row: figure_of("{:.2f}×", row["x_previous"]),
    "memory": lambda row: figure_of("{:.2f} GB", row["peak_memory_bytes"] and row["peak_memory_bytes"] / 1e9),
    "caption": lambda row: {True: "same", False: "OTHER", None: "–"}[row["same_caption"]],
}
"""The columns beside the bars."""
