"""`mplug2-fast features`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    FramesOption,
    RetryOption,
    StrideOption,
    TimeoutOption,
    Videos,
    WindowsOption,
    WorkersOption,
)
from mplug2_fast.cli.predict import load
from mplug2_fast.errors import ConfigError

if TYPE_CHECKING:
    from mplug2_fast.bulk import Ranks, Sources, Work


class Kind(str, Enum):
    """Values of `--kind`."""

    vision = "vision"
    universal = "universal"
    pooled = "pooled"


class Format(str, Enum):
    """Values of `--format`."""

    safetensors = "safetensors"
    npy = "npy"


def features(
    videos: Videos,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The output folder.")],
    kind: Annotated[
        Kind,
        typer.Option(
            help="vision: output of the vision encoder; universal: output of the universal layers, which the decoder "
            "reads; pooled: its class token."
        ),
    ] = Kind.universal,
    format: Annotated[Format, typer.Option(help="File format of the shards.")] = Format.safetensors,
    checkpoint: CheckpointOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    frames: FramesOption = None,
    windows: WindowsOption = None,
    stride: StrideOption = None,
    num_workers: WorkersOption = None,
    timeout: TimeoutOption = None,
    batch_memory: BatchMemoryOption = None,
    decoder: DecoderOption = None,
    retry_failed: RetryOption = False,
) -> None:
    """Compute features of videos and images.

    Writes shards, and index.jsonl with one line per file: where its features are, or its error. Rerun the same command
    to resume an interrupted run.
    """
    with reporting():
        options = BulkOptions(
            frames, windows, stride, num_workers, timeout, batch_memory, decoder, retry_failed or None
        )
        from mplug2_fast import bulk
        from mplug2_fast.bulk.features import INDEX
        from mplug2_fast.predict import Captioner

        def work(ranks: Ranks, sources: Sources) -> Work:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ConfigError(f"{out}: the features cannot be written there: {reason}") from error
            captioner = load(Captioner, checkpoint, dtype, ranks.device(device), quietly=ranks.rank > 0)
            return bulk.Features(captioner, options.frames_of(captioner), kind.value, format.value, out)

        run_bulk(work, lambda: bulk.find_videos(videos), str(out / INDEX), options, "features")
