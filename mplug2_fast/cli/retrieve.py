"""`mplug2-fast retrieve`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug2_fast.cli.bulk import BulkOptions, note_skipped
from mplug2_fast.cli.console import BAD_INPUT, emit, note, shown, waiting
from mplug2_fast.cli.options import ModelOptions, Space, SpaceOption
from mplug2_fast.cli.predict import lines_of, load, note_unknown_words
from mplug2_fast.errors import ConfigError

if TYPE_CHECKING:
    from mplug2_fast.predict import Match, Ranking, Retriever
    from mplug2_fast.tasks.gallery import Gallery


class By(str, Enum):
    """Values of `--by`."""

    text = "text"
    file = "file"


def retrieve(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH", help="Videos or images, folders, and .txt lists with one path per line."),
    ],
    text: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What to search for; repeat it for several.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(metavar="PATH", help="A text file of texts, one per line.")] = None,
    by: Annotated[By, typer.Option(help="text: the best files for each text. file: the best texts for each file.")] = (
        By.text
    ),
    rerank: Annotated[
        int,
        typer.Option(
            metavar="K",
            min=0,
            help="Compare the K best of each with the whole image or video, which is slower and more exact. 0: by "
            "features alone.",
        ),
    ] = 0,
    space: SpaceOption = Space.contrast,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Results per text or file, best first.")] = 5,
    out: Annotated[
        str | None, typer.Option(metavar="PATH", help="Write JSON lines to this file at the end; it is replaced.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per text or file.")] = False,
    *,
    model: ModelOptions,
    bulk_options: BulkOptions,
) -> None:
    """Search with texts in videos and images, or find the texts that describe them.

    Encodes each file once. Prints one line per result: the text, a tab, the file, a tab, and the score; with --by file,
    the file comes first. Scores are cosines, or the logits of the matching head with --rerank: compare them only within
    one search. Files that cannot be read are reported on standard error. The others are still ranked, and the exit
    status is 2.
    """
    if not text and texts is None:
        raise typer.BadParameter("give what to search for with --text or --texts")
    from mplug2_fast import bulk
    from mplug2_fast.predict import Retriever

    wanted = list(dict.fromkeys([*(text or ()), *lines_of(texts, "texts")]))
    if not wanted:
        raise ConfigError(f"{texts}: there are no texts in this file")
    sources = bulk.find_videos(paths)
    note_skipped(sources)
    retriever = load(Retriever, model, **({"task": "clip"} if space is Space.clip else {}))
    retriever.check_texts(wanted)
    note_unknown_words(retriever, wanted, "texts")
    device_type = next(retriever.model.parameters()).device.type
    decoding = bulk_options.decoding(device_type, len(sources.videos), bulk.Ranks({}))
    gallery = retriever.gallery(len(sources.videos), rerank=rerank)
    files = [video.path for video in sources.videos]
    options = {"num_frames": bulk_options.frames, "num_workers": decoding.num_workers, "timeout": decoding.timeout}
    ranking = _ranked(retriever, gallery, files, wanted, options)
    _print(ranking, by, top, as_json, out)
    for reason in sources.unreadable:
        note(f"error: {reason}")
    if sources.unreadable or any(result.error is not None for result in ranking.results):
        raise typer.Exit(BAD_INPUT)


def _ranked(
    retriever: Retriever, gallery: Gallery, files: list[str], texts: list[str], options: dict[str, Any]
) -> Ranking:
    """Encodes the files, reports those that cannot be read, and compares the others with the texts."""
    encoded = retriever.add(gallery, files, **options)
    results = []
    for number, file in enumerate(files, start=1):
        with waiting(f"{shown(file)} ({number} of {len(files)})"):
            results.append(next(encoded))
        if results[-1].error is not None:
            note(f"error: {shown(file)}: {results[-1].error}")
    if not len(gallery):
        raise typer.Exit(BAD_INPUT)
    with waiting("comparing"):
        return retriever.rank(gallery, results, texts)


def _print(ranking: Ranking, by: By, top: int, as_json: bool, out: str | None) -> None:
    found = list(_found(ranking, by, top))
    if out is not None:
        from mplug2_fast.bulk.journal import write_whole

        write_whole(out, "".join(f"{json.dumps(line)}\n" for line in _objects(ranking, by, found)).encode())
    elif as_json:
        for line in _objects(ranking, by, found):
            emit(json.dumps(line))
    else:
        for name, matches in found:
            for match in matches:
                emit(f"{shown(name)}\t{shown(match.name)}\t{match.score:.4f}")


def _found(ranking: Ranking, by: By, top: int) -> Iterator[tuple[str, list[Match]]]:
    """The texts or files, each with its best results."""
    if by is By.text:
        return zip(ranking.texts, ranking.best_files(top), strict=True)
    return zip(ranking.paths, ranking.best_texts(top), strict=True)


def _objects(ranking: Ranking, by: By, found: list[tuple[str, list[Match]]]) -> Iterator[dict[str, Any]]:
    """A JSON object per text or file, and one for each file that cannot be read."""
    name, other = ("text", "path") if by is By.text else ("path", "text")
    for each, matches in found:
        results = [{other: match.name, "score": round(match.score, 6)} for match in matches]
        yield {name: each, "results": results, "error": None}
    for result in ranking.results:
        if result.error is not None:
            yield {"path": result.path, "results": [], "error": result.error}
