"""`mplug2-fast ground`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplug2_fast.cli.bulk import BulkOptions
from mplug2_fast.cli.options import JsonOption, ModelOptions, OutOption
from mplug2_fast.cli.predict import Inputs, run_task
from mplug2_fast.errors import ConfigError, MPlug2Error

if TYPE_CHECKING:
    from mplug2_fast.predict import Grounder, Result


def ground(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH]...", help="Images. With --out also folders, and .txt lists with one path per line."
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help='What to find in each image, such as "the red circle".')
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            metavar="JSONL", help="With --out: JSON lines with path, question (the text) and, optionally, id."
        ),
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Draw the box on a copy of the image: a file, or for several images a folder."
        ),
    ] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    *,
    model: ModelOptions,
    bulk_options: BulkOptions,
) -> None:
    """Find what a text names in images.

    Prints one line per image, in order: its name, a tab, and the box: left, top, right and bottom in pixels of the
    upright image. Files that cannot be read are reported on standard error. The others are still processed, and the
    exit status is 2.

    With --out the results go to a file, one JSON object per text, and PATH may also be a folder or a .txt list. Rerun
    the same command to resume an interrupted run.
    """
    if (text is None) == (texts is None):
        raise typer.BadParameter("give either --text or, with --out, --texts")
    if bool(files) == (texts is not None):
        raise typer.BadParameter("give files with --text, but not with --texts, which lists them")
    if draw is not None and out is not None:
        raise ConfigError("--draw: not with --out, whose lines have the boxes")
    from mplug2_fast.predict import Grounder

    done = None if draw is None or files is None else functools.partial(_draw, _places(draw, files))
    inputs = Inputs(files, text, texts)
    run_task(Grounder, model, inputs, {}, out, as_json, bulk_options, "boxes", done=done)


def _places(draw: Path, files: list[str]) -> list[Path]:
    """Where the picture of each file goes. Raises `ConfigError` if it cannot be written there."""
    from mplug2_fast.images.draw import require_writable

    if len(files) == 1 and not draw.is_dir():
        require_writable(draw)
        return [draw]
    try:
        draw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{draw}: --draw must name a folder for several images: {error.strerror}") from error
    used: set[str] = set()
    places = []
    for file in files:
        stem = name = Path(file).stem
        number = 1
        while name in used:
            number += 1
            name = f"{stem} {number}"
        used.add(name)
        places.append(draw / f"{name}.png")
    return places


def _draw(places: list[Path], grounder: Grounder, number: int, result: Result) -> None:
    """Draws the box of a result on its picture."""
    from mplug2_fast.images.draw import save, with_box
    from mplug2_fast.video import VideoReader
    from mplug2_fast.video.limits import Guard, Limits

    assert result.box is not None
    try:
        pixels = grounder.preparation.still(result.path, 1, Guard(Limits()))
        if pixels is None:  # a video, or an image that only the video decoder reads
            with VideoReader(result.path, threads=1) as reader:
                pixels = reader.frames(list(result.frames[:1]))[0].numpy()
    except OSError as error:
        raise MPlug2Error(f"{result.path}: the picture cannot be read again: {error.strerror}") from error
    save(with_box(pixels, result.box), places[number])
