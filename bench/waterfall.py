"""From the official algorithm to the fast model, one technique per row, each in its own process."""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import machine, table
from bench.case import OURS
from bench.clock import Turns
from bench.plan import Plan, Spec
from bench.process import Process
from bench.progress import Progress
from bench.waterfall_steps import StepWorker, techniques
from mplug2_fast.info import available_memory

SLOW_SECONDS = 30.0
"""A slower technique is neither warmed up nor repeated: its first run counts."""
ALLOWED_ERROR = 1e-4
"""Of a score in float32. Narrow dtypes are not judged by it, because rounding may make another beam the best."""


@dataclass(frozen=True)
class Row:
    """A technique, together with those of all rows before it.

    Attributes:
        seconds: median of `runs` runs.
        x_released, x_previous: how many times faster than the first row and than the row before.
        peak_memory_bytes: of the whole process on a CPU, which holds only the weights that it uses; of the allocator on
            CUDA.
        same_caption: whether the best caption has the first row's tokens. relative_error: of its score.
    """

    technique: str
    seconds: float
    runs: int
    x_released: float
    x_previous: float | None
    peak_memory_bytes: int | None
    same_caption: bool
    relative_error: float
    dtype: str


def steps_of(plan: Plan) -> dict[str, tuple[str, str]]:
    """Row -> technique and dtype: all techniques in float32, the last one in the plan's narrow dtype or bfloat16."""
    rows = {name: (name, "float32") for name in techniques(plan.device)}
    narrow = next((dtype for dtype in plan.dtypes if dtype != "float32"), "bfloat16")
    return rows | {narrow: (list(rows)[-1], narrow)}


def run(plan: Plan, progress: Progress) -> dict[str, Any]:
    """The results, as written to JSON."""
    described, versions = machine.describe()
    described |= {"threads": plan.threads, "device": plan.device}
    with tempfile.TemporaryDirectory() as exchange:
        description = plan.save_video(Path(exchange))
        replies, notes = measure(plan, exchange, progress)
    return {
        "machine": described,
        "versions": versions,
        "command": command(plan),
        "sizes": plan.sizes,
        "rows": [asdict(row) for row in tabulate(steps_of(plan), replies)],
        "notes": [f"Input: {description}.", *notes],
    }


def command(plan: Plan) -> str:
    """The command that repeats all rows."""
    words = ["--waterfall", "--preset", plan.preset, "--dtype", ",".join(plan.dtypes), *plan.size_options()]
    return plan.command_of(words)


def measure(plan: Plan, exchange: str, progress: Progress) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The runs of each row, and notes. Rows whose processes fit into memory together take turns."""
    replies: dict[str, list[dict[str, Any]]] = {}
    slow, alone = [], []
    with ExitStack() as stack:
        workers = {}

        def once(name: str, worker: Process, what: str) -> dict[str, Any]:
            what = f"{name} · {what}"
            progress.begin(what)
            reply = worker.call(StepWorker.run)
            progress.finished(what, reply["seconds"])
            return reply

        def again(repeat: int, name: str, worker: Process) -> None:
            replies[name].append(once(name, worker, f"run {repeat + 1} of {plan.repeats}"))

        for name, (technique, dtype) in steps_of(plan).items():
            progress.begin(f"{name} · starting")
            spec = Spec("waterfall", dtype, plan.device, plan.threads, plan.config, plan.beams, plan.steps, exchange)
            worker = stack.enter_context(Process(f"{technique} {dtype}", StepWorker, spec, technique)).ready()
            first = once(name, worker, "first run")
            replies[name] = []
            if first["seconds"] > SLOW_SECONDS:
                replies[name].append(first)
                slow.append(name)
                worker.close()
            elif available_memory() > 2 * (first["peak_memory_bytes"] or 0):
                workers[name] = worker
            else:
                for repeat in range(plan.repeats):
                    again(repeat, name, worker)
                alone.append(name)
                worker.close()
        for repeat in range(plan.repeats):
            for name, worker in workers.items():
                again(repeat, name, worker)
    notes = []
    if slow:
        notes.append(f"Timed once, no warm-up (> {SLOW_SECONDS:g} s): {'; '.join(slow)}.")
    if alone:
        notes.append(f"All processes together do not fit into memory. Not timed in turns: {'; '.join(alone)}.")
    return replies, notes


def tabulate(steps: Mapping[str, tuple[str, str]], replies: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    names = list(steps)
    exact = replies[names[0]][0]
    rows = []
    for index, name in enumerate(names):
        runs = replies[name]
        peaks = [run["peak_memory_bytes"] for run in runs if run["peak_memory_bytes"] is not None]
        pairs = list(zip(runs[-1]["scores"], exact["scores"], strict=True))
        rows.append(
            Row(
                technique=name,
                seconds=statistics.median(run["seconds"] for run in runs),
                runs=len(runs),
                x_released=ratio(replies[names[0]], runs),
                x_previous=ratio(replies[names[index - 1]], runs) if index else None,
                peak_memory_bytes=max(peaks, default=None),
                same_caption=runs[-1]["captions"] == exact["captions"],
                relative_error=math.dist(*zip(*pairs, strict=True)) / math.hypot(*exact["scores"]),
                dtype=steps[name][1],
            )
        )
    return rows


def ratio(slower: Sequence[Mapping[str, Any]], faster: Sequence[Mapping[str, Any]]) -> float:
    """How many times faster `faster` is; `bench.clock.Turns.ratio`."""
    before, after = ([run["seconds"] for run in runs] for runs in (slower, faster))
    return Turns({OURS: after, "before": before}).ratio("before")


def is_wrong(row: Mapping[str, Any]) -> bool:
    return row["dtype"] == "float32" and not row["relative_error"] <= ALLOWED_ERROR


def wrong(results: Mapping[str, Any]) -> list[str]:
    """The techniques with a wrong result."""
    return [row["technique"] for row in results["rows"] if is_wrong(row)]


def _error(row: Mapping[str, Any]) -> str:
    text = "0" if row["relative_error"] == 0 else f"{row['relative_error']:.0e}"
    return f"{text} WRONG" if is_wrong(row) else text


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "technique": lambda row: row["technique"],
    "dtype": lambda row: row["dtype"],
    "time": lambda row: table.seconds(row["seconds"]),
    "× released": lambda row: table.ratio(row["x_released"]),
    "× row before": lambda row: table.ratio(row["x_previous"]),
    "peak memory": lambda row: (
        table.MISSING if row["peak_memory_bytes"] is None else table.size(row["peak_memory_bytes"])
    ),
    "same caption": lambda row: "yes" if row["same_caption"] else "no",
    "error of score": _error,
}
"""Column heads, and the text of a cell."""
TEXT = ("technique", "dtype", "same caption")


def cells(results: Mapping[str, Any]) -> list[list[str]]:
    """The text of all rows. A "+" says that a row adds to the one before."""
    found = [[cell(row) for cell in COLUMNS.values()] for row in results["rows"]]
    return [[f"{'+ ' if index else ''}{first}", *others] for index, (first, *others) in enumerate(found)]


def about(results: Mapping[str, Any]) -> str:
    return f"{results['sizes']} · {machine.words(results['machine'], results['versions'])}"


def show(results: Mapping[str, Any]) -> None:
    """Prints the table on stdout."""
    console = Console() if sys.stdout.isatty() else Console(width=160)
    grid = Table(title=f"captioning, {about(results)}", title_justify="left")
    for head in COLUMNS:
        grid.add_column(head, justify="left" if head in TEXT else "right", no_wrap=head == "technique")
    for row in cells(results):
        grid.add_row(*row)
    console.print(grid)
    for note in results["notes"]:
        console.print(Text(note))


def markdown(results: Mapping[str, Any]) -> str:
    """The table, the sizes and the machine."""
    lines = [
        " | ".join(COLUMNS),
        " | ".join(":---" if head in TEXT else "---:" for head in COLUMNS),
        *(" | ".join(row) for row in cells(results)),
    ]
    return "\n".join(f"| {line} |" for line in lines) + f"\n\nCaptioning, {about(results)}.\n"
