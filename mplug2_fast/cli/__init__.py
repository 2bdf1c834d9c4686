"""The command line: `mplug2-fast caption`, `answer`, `ground`, `retrieve`, `train`, `evaluate` and others.

Results go to standard output, everything else to standard error. Exit statuses: 0 success, 2 a bad file, checkpoint or
option, 130 Ctrl-C, 141 the reader of the results closed the pipe. Slow imports are inside the commands, so that
`--help` is quick.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import mplug2_fast
from mplug2_fast.cli.answer import answer, rank
from mplug2_fast.cli.checkpoints import convert, inspect
from mplug2_fast.cli.classify import classify, match
from mplug2_fast.cli.compare_dtypes import compare_dtypes
from mplug2_fast.cli.console import OutputError, output_failed, prepare_streams
from mplug2_fast.cli.data import data
from mplug2_fast.cli.evaluate import compare, evaluate
from mplug2_fast.cli.features import features
from mplug2_fast.cli.generate import generate_text
from mplug2_fast.cli.ground import ground
from mplug2_fast.cli.options import grouped
from mplug2_fast.cli.predict import caption, predict
from mplug2_fast.cli.report import info
from mplug2_fast.cli.retrieve import retrieve
from mplug2_fast.cli.train import train

app = typer.Typer(
    name="mplug2-fast",
    help="Caption videos and images, answer questions about them, find what a text names, search, and classify.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
NOT_OF_IMAGES = ("frames", "windows", "stride")
NOT_OF_TEXTS = ("frames", "windows", "stride", "num_workers", "timeout", "decoder", "retry_failed")
NOT_OF_SEARCH = ("windows", "stride", "batch_memory", "decoder", "retry_failed")
for command in (
    grouped(caption),
    grouped(answer),
    grouped(rank),
    grouped(ground, without=NOT_OF_IMAGES),
    grouped(retrieve, without=NOT_OF_SEARCH),
    grouped(match),
    grouped(classify),
    grouped(generate_text, without=NOT_OF_TEXTS),
    grouped(predict),
    grouped(features),
    train,
    grouped(evaluate, without=("windows", "stride")),
    compare,
    compare_dtypes,
    convert,
    inspect,
    info,
):
    app.command()(command)
app.add_typer(data, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mplug2-fast {mplug2_fast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    """The entry point of the `mplug2-fast` command."""
    prepare_streams()
    # PyTorch reads this at its first allocation and then puts activations into huge pages, which saves page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app()
    except OutputError as error:  # --help or --version could not write
        sys.exit(output_failed(error))
