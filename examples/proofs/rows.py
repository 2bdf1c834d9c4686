"""The proofs: what is trained, on what it is scored, and the bar."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from examples.proofs import digits, motion
from mplug2_fast.training import Sample

FOLDER = Path(__file__).parent


class Row(NamedTuple):
    """One proof.

    Attributes:
        title, bar: for people.
        recipe: file name.
        held_out: from the configuration of the model to samples that it was not trained on.
        peers: measures what the model is compared with.
    """

    title: str
    bar: str
    recipe: str
    held_out: Callable[[Any], list[Sample]]
    peers: Callable[[], dict[str, float]] | None = None


ROWS = {
    "digits": Row(
        "Image classification: handwritten digits, 4,000 to train on",
        "≥ RBF SVM",
        "digits.toml",
        digits.held_out,
        peers=digits.svm,
    ),
    "actions": Row("Action recognition: moving shapes", "≥ 99%", "actions.toml", motion.held_out_actions),
    "entailment": Row(
        "Visual entailment: a frame of moving shapes and a sentence",
        "≥ 95%",
        "entailment.toml",
        motion.held_out_entailment,
    ),
}


def table() -> str:
    """The committed results in Markdown."""
    lines = ["| proof | bar | accuracy | for comparison | steps | CPU minutes |"]
    lines += ["| --- | --- | ---: | --- | ---: | ---: |"]
    for name, row in ROWS.items():
        path = FOLDER / "results" / f"{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        peers = ", ".join(f"{peer.replace('_', ' ')} {value:.1%}" for peer, value in result.get("peers", {}).items())
        figures = f"{result['accuracy']:.1%} | {peers} | {result['steps']:,} | {result['cpu_minutes']:.1f}"
        lines.append(f"| {row.title} | {row.bar} | {figures} |")
    return "\n".join(lines)
