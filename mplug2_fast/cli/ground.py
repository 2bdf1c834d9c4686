"""`mplug2-fast ground`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug2_fast.cli.bulk import BulkOptions, run_bulk
from mplug2_fast.cli.console import reporting
from mplug2_fast.cli.options import (
    BatchMemoryOption,
    CheckpointOption,
    DecoderOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    OutOption,
    RetryOption,
    TimeoutOption,
    WorkersOption,
)
from mplug2_fast.cli.predict import check_texts, in_a_process, load, note_unknown_words, print_results
from mplug2_fast.errors import ConfigError, MPlug2Error

if TYPE_CHECKING:
    from mplug2_fast.bulk import Ranks, Sources, Work
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
    checkpoint: CheckpointOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    num_workers: WorkersOption = None,
    timeout: TimeoutOption = None,
    batch_memory: BatchMemoryOption = None,
    decoder: DecoderOption = None,
    retry_failed: RetryOption = False,
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
    with reporting():
        bulk_options = BulkOptions(None, None, None, num_workers, timeout, batch_memory, decoder, retry_failed)
        from mplug2_fast.predict import Grounder

        if out is None:
            dataclasses.replace(bulk_options, timeout=None).require_none()
            if text is None or files is None:
                raise ConfigError("--texts: only with --out, which names the output file")
            places = None if draw is None else _places(draw, files)
            grounder = load(Grounder, checkpoint, dtype, device)
            results = grounder.ground(files, text, **in_a_process(timeout))
            note_unknown_words(grounder, [text], "text")
            done = None if places is None else _drawing(grounder, places)
            print_results(grounder, results, files, as_json, done, question=text)
            return
        if draw is not None:
            raise ConfigError("--draw: not with --out, whose lines have the boxes")
        from mplug2_fast import bulk

        def find() -> Sources:
            if texts is not None:
                return bulk.read_questions(texts)
            return bulk.ask_all(bulk.find_videos(files or ()), text or "")

        def work(ranks: Ranks, sources: Sources) -> Work[Any]:
            grounder = load(Grounder, checkpoint, dtype, ranks.device(device), quietly=ranks.rank > 0)
            check_texts(grounder, sources, ranks)
            return bulk.Predict(grounder, bulk_options.frames_of(grounder), {})

        run_bulk(work, find, out, bulk_options, "boxes")


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


def _drawing(grounder: Grounder, places: list[Path]) -> Callable[[int, Result], None]:
    """Draws the box of a result on its picture."""
    from mplug2_fast.images.draw import save, with_box
    from mplug2_fast.video import VideoReader
    from mplug2_fast.video.limits import Guard, Limits

    def done(number: int, result: Result) -> None:
        assert result.box is not None
        try:
            pixels = grounder.preparation.still(result.path, 1, Guard(Limits()))
            if pixels is None:  # a video, or an image that only the video decoder reads
                with VideoReader(result.path, threads=1) as reader:
                    pixels = reader.frames(list(result.frames[:1]))[0].numpy()
        except OSError as error:
            raise MPlug2Error(f"{result.path}: the picture cannot be read again: {error.strerror}") from error
        save(with_box(pixels, result.box), places[number])

    return done
