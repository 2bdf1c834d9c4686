"""`mplug2-fast features`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplug2_fast.cli.bulk import BulkOptions, run_bulk
from mplug2_fast.cli.options import ModelOptions, OptionalVideos
from mplug2_fast.cli.predict import check_texts, lines_of, load
from mplug2_fast.errors import ConfigError

if TYPE_CHECKING:
    from mplug2_fast.bulk import Ranks, Sources, Work


class Kind(str, Enum):
    """Values of `--kind`."""

    vision = "vision"
    universal = "universal"
    pooled = "pooled"
    contrast = "contrast"
    clip = "clip"


class Format(str, Enum):
    """Values of `--format`."""

    safetensors = "safetensors"
    npy = "npy"


def features(
    out: Annotated[Path, typer.Option(metavar="DIR", help="The output folder.")],
    videos: OptionalVideos = None,
    texts: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Instead of files: a text file, one text per line. Only contrast and clip."),
    ] = None,
    kind: Annotated[
        Kind,
        typer.Option(
            help="vision: output of the vision encoder; universal: output of the universal layers, which the decoder "
            "reads; pooled: its class token; contrast: of norm 1, for comparison with those of texts; clip: the same "
            "by CLIP's towers."
        ),
    ] = Kind.universal,
    format: Annotated[Format, typer.Option(help="File format of the shards.")] = Format.safetensors,
    *,
    model: ModelOptions,
    bulk_options: BulkOptions,
) -> None:
    """Compute features of videos and images, or of texts.

    Writes shards, and index.jsonl with one line per file or text: where its features are, or its error. Rerun the same
    command to resume an interrupted run.
    """
    if bool(videos) == (texts is not None):
        raise typer.BadParameter("give either files or --texts")
    from mplug2_fast import bulk
    from mplug2_fast.bulk.features import INDEX
    from mplug2_fast.predict import Captioner, Retriever
    from mplug2_fast.tasks import Clip

    def work(ranks: Ranks, sources: Sources) -> Work:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{out}: the features cannot be written there: {reason}") from error
        more = {"task": Clip.name} if kind is Kind.clip else {}
        predictor = load(Retriever if kind in (Kind.contrast, Kind.clip) else Captioner, model, ranks, **more)
        if texts is not None:
            check_texts(predictor, sources, ranks)
        frames = bulk_options.frames_of(predictor)
        return bulk.Features(predictor, frames, kind.value, format.value, out, of_texts=texts is not None)

    def find() -> Sources:
        return bulk.find_videos(videos or ()) if texts is None else bulk.texts_alone(lines_of(texts, "texts"))

    run_bulk(work, find, str(out / INDEX), bulk_options, "features", "video" if texts is None else "text")
