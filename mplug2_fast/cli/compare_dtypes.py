"""`mplug2-fast compare-dtypes`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from mplug2_fast.cli.console import emit, reporting, waiting
from mplug2_fast.cli.options import DeviceOption, Dtype, KeepOption
from mplug2_fast.cli.predict import task_of
from mplug2_fast.cli.tables import columns, names_and_values

if TYPE_CHECKING:
    from mplug2_fast.evaluation import PrecisionComparison


class Backend(str, Enum):
    """Values of `--backend`."""

    torch = "torch"
    reference = "reference"


def compare_dtypes(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="An official .pth, a directory, a .safetensors, or owner/name.")
    ],
    files: Annotated[list[str], typer.Argument(metavar="PATH...", help="Videos or images.")],
    dtype: Annotated[Dtype, typer.Option(help="The dtype to judge.")] = Dtype.int8,
    against: Annotated[Dtype, typer.Option(help="The dtype that counts as exact.")] = Dtype.float32,
    keep: KeepOption = None,
    task: Annotated[
        str | None, typer.Option(metavar="TASK", help="A task, such as captioning.  [default: as the checkpoint says]")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="The text for each file.")] = None,
    device: DeviceOption = "cpu",
    backend: Annotated[
        Backend | None,
        typer.Option(help="The backend of both models: torch judges fp8 without a GPU.  [default: the fastest]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a dtype costs: results that differ, and the error of each block.

    Both models are in memory. The last line is a --keep option with the blocks that contribute most to the error.
    """
    with reporting():
        from mplug2_fast import evaluation
        from mplug2_fast.ops import use_backend
        from mplug2_fast.predict import Predictor

        chosen = task_of(task)
        with nullcontext() if backend is None else use_backend(backend.value):
            with waiting("loading the model twice"):
                reference = Predictor(checkpoint, task=chosen, dtype=against.value, device=device)
                other = Predictor(checkpoint, task=chosen, dtype=dtype.value, device=device, keep=keep or ())
            with waiting("comparing"):
                found = evaluation.compare_dtypes(reference, other, files, text)
        if as_json:
            emit(json.dumps(found.to_json()))
        else:
            for part in _told(found):
                emit(part)


def _told(found: PrecisionComparison) -> Iterator[str]:
    yield names_and_values(_facts(found))
    if found.differences:
        rows = [(each.path, each.reference, each.found) for each in found.differences]
        yield "\n" + columns(("file", found.against, found.dtype), rows)
    rows = [(block.name, f"{block.alone:.2e}", f"{block.together:.2e}", f"{block.share:.1%}") for block in found.blocks]
    yield "\n" + columns(("relative error", "alone", "together", "share"), rows)
    if found.keep:
        yield "\n" + " ".join(f"--keep '{name}'" for name in found.keep)


def _facts(found: PrecisionComparison) -> Iterator[tuple[str, str]]:
    yield "task", found.task
    yield "dtypes", f"{found.dtype}, against {found.against}"
    yield "same results", f"{found.agreement:.1%} of {found.files:,} files"
    mean, most = found.mean_score_difference, found.max_score_difference
    yield "scores", f"differ by {mean:.4f} on average, by {most:.4f} at most"
    yield "visual tokens", f"relative error {found.visual_error:.2e}"
    if found.logits_error is not None:
        yield "logits", f"relative error {found.logits_error:.2e}"
