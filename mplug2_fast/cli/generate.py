"""`mplug2-fast generate-text`."""

from __future__ import annotations

from typing import Annotated

import typer

from mplug2_fast.cli.bulk import BulkOptions
from mplug2_fast.cli.options import JsonOption, ModelOptions, OutOption, SearchOptions
from mplug2_fast.cli.predict import Inputs, run_task


def generate_text(
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="The text to start from.")] = None,
    texts: Annotated[str | None, typer.Option(metavar="PATH", help="A .txt file with one text per line.")] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    *,
    model: ModelOptions,
    search: SearchOptions,
    bulk_options: BulkOptions,
) -> None:
    """Generate texts from texts, such as summaries, with a checkpoint that was trained for it.

    Prints one line per text, in order: the text, a tab, and what was generated. With --out the results go to a file,
    one JSON object per text. Rerun the same command to resume an interrupted run.
    """
    inputs = Inputs(None, text, texts)
    from mplug2_fast.predict import TextGenerator

    run_task(TextGenerator, model, inputs, vars(search), out, as_json, bulk_options, "texts")
