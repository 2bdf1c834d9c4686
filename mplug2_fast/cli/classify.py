"""`mplug2-fast classify` and `match`."""

from __future__ import annotations

from typing import Annotated

import typer

from mplug2_fast.cli.bulk import BulkOptions
from mplug2_fast.cli.options import TEXTS_HELP, JsonOption, ModelOptions, OptionalVideos, OutOption, ReturnOption
from mplug2_fast.cli.predict import Inputs, run_task


def classify(
    files: OptionalVideos = None,
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The text for each file, or the text to classify.")
    ] = None,
    texts: Annotated[str | None, typer.Option(metavar="PATH", help=TEXTS_HELP)] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A classification, if the checkpoint has several.  [default: the first one]"),
    ] = None,
    clips: Annotated[
        int, typer.Option(metavar="N", min=1, help="Clips per video at different times, whose results are averaged.")
    ] = 1,
    crops: Annotated[
        int, typer.Option(metavar="N", min=1, help="Crops per clip along the long side, whose results are averaged.")
    ] = 1,
    out: OutOption = None,
    num_return: ReturnOption = 1,
    as_json: JsonOption = False,
    *,
    model: ModelOptions,
    bulk_options: BulkOptions,
) -> None:
    """Classify videos, images, texts, or both together.

    The labels and what they belong to are in the checkpoint. Prints one line per file or text, in order: its name, a
    tab, the label, a tab, and the probability. Files that cannot be read are reported on standard error. The others are
    still classified, and the exit status is 2.

    With --out the results go to a file, one JSON object per file or text, and PATH may also be a folder or a .txt list.
    Rerun the same command to resume an interrupted run.
    """
    inputs = Inputs(files, text, texts)
    from mplug2_fast.predict import Classifier

    options, more = {"num_return": num_return}, {"task": task, "clips": clips, "crops": crops}
    run_task(Classifier, model, inputs, options, out, as_json, bulk_options, "classes", scores=True, **more)


def match(
    files: OptionalVideos = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="What the files may show.")] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            metavar="JSONL", help="With --out: JSON lines with path, question (the text) and, optionally, id."
        ),
    ] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    *,
    model: ModelOptions,
    bulk_options: BulkOptions,
) -> None:
    """Score how well a text goes with videos and images.

    The matching head compares the text with the whole video or image. Prints one line per file, in order: its name, a
    tab, the text, a tab, and the probability that they match. To search in many files with many texts, use retrieve.

    With --out the results go to a file, one JSON object per file or text, and PATH may also be a folder or a .txt list.
    Rerun the same command to resume an interrupted run.
    """
    if (text is None) == (texts is None):
        raise typer.BadParameter("give either --text or, with --out, --texts")
    inputs = Inputs(files, text, texts)
    from mplug2_fast.predict import Matcher

    run_task(Matcher, model, inputs, {}, out, as_json, bulk_options, "scores", scores=True)
