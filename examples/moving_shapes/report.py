"""The scores of a checkpoint as tables: in the terminal, and in Markdown for the committed results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from examples.moving_shapes.generator import QUESTION_KINDS

RESULTS = Path(__file__).with_name("results.json")


class Row(NamedTuple):
    """A score: its title, and the goal in percent if it has one."""

    title: str
    goal: float | None = None


ROWS = {
    "captions": Row("captions, exactly right", 99),
    "answers": Row("answers, exactly right", 99),
    **{f"answers_{kind}": Row(f"answers about the {kind}") for kind in QUESTION_KINDS},
    "direction": Row("captions: left or right, up or down, grows or shrinks (chance 50%)"),
    "actions": Row("actions", 99),
    "boxes": Row("boxes with an IoU of at least 0.5", 95),
    "mean_iou": Row("mean IoU of boxes", 80),
    "caption_of_clip_features": Row("captions found first by their clip, among 336", 95),
    "clip_of_caption_features": Row("clips found first by their caption, among 336", 95),
    "caption_of_clip_reranked": Row("captions, re-ranked by the matching head", 95),
    "clip_of_caption_reranked": Row("clips, re-ranked by the matching head", 95),
    "logs": Row("events of logs, exactly right", 95),
}


def show(result: Mapping[str, float], console: Console) -> None:
    table = Table(title=f"{result['clips']} held-out clips")
    table.add_column("score")
    table.add_column("%", justify="right")
    for key, row in ROWS.items():
        if key in result:
            table.add_row(row.title, f"{100 * result[key]:.1f}")
    console.print(table)


def table() -> str:
    """The committed results of the tiny model in all tasks, in Markdown."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    found, ablation = results["tiny"], results["all_tasks_no_local_temporal"]
    lines = [f"| {found['clips']:,} held-out clips | tiny model | goal | without local temporal modules |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for key, row in ROWS.items():
        goal = "" if row.goal is None else f"{row.goal:g}%"
        figures = [f"{100 * each[key]:.1f}%" if key in each else "" for each in (found, ablation)]
        lines.append(f"| {row.title} | {figures[0]} | {goal} | {figures[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
