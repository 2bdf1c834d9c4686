"""From the released algorithm to the fast model, one technique a row, each in a process of its own."""

from __future__ import annotations

import math
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import inputs, machine, table
from bench.case import OURS
from bench.progress import Progress
from bench.turns import Turns
from bench.waterfall_steps import techniques
from bench.workers import Client
from mplug2_fast.info import available_memory

if TYPE_CHECKING:
    from bench.plan import Plan
    from bench.runner import Progress

# What takes longer is neither warmed up nor repeated: its first run counts.
SLOW_SECONDS = 30.0
# Of a score in float32. Narrow dtypes are not judged by it: where they round, another beam may become the best.
ALLOWED_ERROR = 1e-4


@dataclass(frozen=True)
class Row:
    """A technique together with all those of the rows before it.

    Attributes:
        seconds: the median of `runs` runs.
        x_released, x_previous: how many times faster than the first row, and than the row before.
        peak_memory_bytes: of the whole process on a CPU, with no other weights than it uses; of the allocator on CUDA.
        same_caption: whether the best caption has the tokens of the first row's. relative_error: of its score.
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
    """Row -> its technique and dtype: all techniques in float32, then all of them in the plan's narrow dtype, or
    bfloat16."""
    rows = {name: (name, "float32") for name in techniques(plan.device)}
    narrow = next((dtype for dtype in plan.dtypes if dtype != "float32"), "bfloat16")
    return rows | {narrow: (list(rows)[-1], narrow)}


def run(plan: Plan, progress: Progress) -> dict[str, Any]:
    """The results as they are written to JSON."""
    described, versions = machine.describe()
    described |= {"threads": plan.threads, "device": plan.device}
    with tempfile.TemporaryDirectory() as exchange:
        video, description = inputs.load(plan.video, plan.frames, plan.config.vision.image_size)
        torch.save(video.expand(plan.batch, *video.shape).contiguous(), Path(exchange) / "video.pt")
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
    """The command that measures all rows again."""
    words = ["python", "bench/run.py", "--waterfall", "--preset", plan.preset, "--dtype", ",".join(plan.dtypes)]
    for option in ("device", "frames", "beams", "steps", "batch", "repeats", "threads"):
        words += [f"--{option}", str(getattr(plan, option))]
    return shlex.join(words + (["--video", plan.video.name] if plan.video else []))


def measure(plan: Plan, exchange: str, progress: Progress) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The runs of every row, and notes. Rows whose processes fit in memory together take turns."""
    replies: dict[str, list[dict[str, Any]]] = {}
    slow, alone = [], []
    with ExitStack() as stack:
        clients = {}

        def once(name: str, client: Client, what: str) -> dict[str, Any]:
            what = f"{name} · {what}"
            progress.begin(what)
            reply = client.call("run")
            progress.finished(what, reply["seconds"])
            return reply

        def again(repeat: int, name: str, client: Client) -> None:
            replies[name].append(once(name, client, f"run {repeat + 1} of {plan.repeats}"))

        for name, (technique, dtype) in steps_of(plan).items():
            progress.begin(f"{name} · starting")
            client = stack.enter_context(start(plan, technique, dtype, exchange))
            first = once(name, client, "first run")
            replies[name] = []
            if first["seconds"] > SLOW_SECONDS:
                replies[name].append(first)
                slow.append(name)
                client.close()
            elif available_memory() > 2 * (first["peak_memory_bytes"] or 0):
                clients[name] = client
            else:
                for repeat in range(plan.repeats):
                    again(repeat, name, client)
                alone.append(name)
                client.close()
        for repeat in range(plan.repeats):
            for name, client in clients.items():
                again(repeat, name, client)
    notes = []
    if slow:
        notes.append(f"Timed once, without a warm-up, for it takes over {SLOW_SECONDS:g} s: {'; '.join(slow)}.")
    if alone:
        notes.append(f"Memory does not hold all processes at once: not timed in turns: {'; '.join(alone)}.")
    return replies, notes


def start(plan: Plan, technique: str, dtype: str, exchange: str) -> Client:
    sizes = {name: getattr(plan, name) for name in ("device", "threads", "beams", "steps")}
    spec = {"implementation": "waterfall", "technique": technique, "dtype": dtype, "exchange": exchange, **sizes}
    return Client({**spec, "config": plan.config.to_dict()}, f"{technique} {dtype}").ready()


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
    """Of times: the median over the turns where both took as many, else that of the medians."""
    before, after = ([run["seconds"] for run in runs] for runs in (slower, faster))
    return Turns({OURS: after, "before": before}).ratio("before")


def is_wrong(row: Mapping[str, Any]) -> bool:
    return row["dtype"] == "float32" and not row["relative_error"] <= ALLOWED_ERROR


def wrong(results: Mapping[str, Any]) -> list[str]:
    """The techniques whose result is wrong."""
    return [row["technique"] for row in results["rows"] if is_wrong(row)]


def _error(row: Mapping[str, Any]) -> str:
    text = "0" if row["relative_error"] == 0 else f"{row['relative_error']:.0e}"
    return f"{text} WRONG" if is_wrong(row) else text


# Column heads and how each cell is written.
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
TEXT = ("technique", "dtype", "same caption")


def cells(results: Mapping[str, Any]) -> list[list[str]]:
    """The text of all rows; each but the first adds to the one before."""
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
    """The table and what was measured, and on what."""
    lines = [
        " | ".join(COLUMNS),
        " | ".join(":---" if head in TEXT else "---:" for head in COLUMNS),
        *(" | ".join(row) for row in cells(results)),
    ]
    return "\n".join(f"| {line} |" for line in lines) + f"\n\nCaptioning, {about(results)}.\n"
