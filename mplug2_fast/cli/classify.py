"""`mplug2-fast classify` and `match`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mplug2_fast.cli.bulk import BulkOptions
from mplug2_fast.cli.options import (
    TEXTS_HELP,
    JsonOption,
    ModelOptions,
    OptionalVideos,
    OutOption,
    ReturnOption,
    Space,
    SpaceOption,
)
from mplug2_fast.cli.predict import Inputs, lines_of, run_task


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
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Without training: the name of a class; repeat it for several."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A text file of names of classes, one per line.")
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help='A text around the names, such as "a video of {}"; repeat it for several.'),
    ] = None,
    space: SpaceOption = Space.contrast,
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

    The checkpoint says which labels there are, and for what. With --label or --labels, a checkpoint that was trained
    for retrieval chooses among these names. Prints one line per file or text, in order: its name, a tab, the label, a
    tab, and the probability. Files that cannot be read are reported on standard error. The others are still
    classified, and the exit status is 2.

    With --out the results go to a file, one JSON object per file or text, and PATH may also be a folder or a .txt list.
    Rerun the same command to resume an interrupted run.
    """
    inputs = Inputs(files, text, texts)
    from mplug2_fast.predict import Classifier
    from mplug2_fast.tasks import ZeroShot
    from mplug2_fast.tasks.base import require

    names = [*(label or ()), *lines_of(labels, "labels")]
    chosen: Any = task
    if names:
        require(task is None, "--task: not with --label and --labels")
        chosen = ZeroShot(names, space.value, template or ("{}",))
    else:
        require(template is None and space is Space.contrast, "--template and --features: only with --label")
    options, more = {"num_return": num_return}, {"task": chosen, "clips": clips, "crops": crops}
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
