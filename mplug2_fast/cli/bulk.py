"""Shared by the commands that write results to a file: options, progress, the summary and the exit status."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import typer

from mplug2_fast.cli.console import BAD_INPUT, note, shown
from mplug2_fast.cli.options import (
    BatchMemoryOption,
    Decoder,
    DecoderOption,
    FramesOption,
    RetryOption,
    StrideOption,
    TimeoutOption,
    WindowsOption,
    WorkersOption,
)
from mplug2_fast.errors import ConfigError

if TYPE_CHECKING:
    from mplug2_fast.bulk import Decoding, Frames, Plan, Ranks, Sources, Summary, Work
    from mplug2_fast.predict import Predictor

SECONDS_BETWEEN_NOTES = 30.0
MAX_TIMEOUT = 1_000_000
MAX_BATCH_MEMORY = 1_000_000
MAX_STRIDE = 1_000_000_000


@dataclass(frozen=True)
class BulkOptions:
    """Options of runs with `--out`. Other runs have the timeout alone."""

    frames: FramesOption = None
    windows: WindowsOption = None
    stride: StrideOption = None
    num_workers: WorkersOption = None
    timeout: TimeoutOption = None
    batch_memory: BatchMemoryOption = None
    decoder: DecoderOption = None
    retry_failed: RetryOption = False

    def __post_init__(self) -> None:
        """Raises `ConfigError` for a number out of range."""
        for name, value, least, most, unit in (
            ("--timeout", self.timeout, 0.1, MAX_TIMEOUT, "seconds"),
            ("--batch-memory", self.batch_memory, 0.001, MAX_BATCH_MEMORY, "GiB"),
            ("--stride", self.stride, 1, MAX_STRIDE, "frames"),
        ):
            if value is not None and not least <= value <= most:  # also for NaN
                raise ConfigError(f"{name} must be from {least:g} to {most:,} {unit}, not {value:g}")

    def require_out(self) -> None:
        """Raises `ConfigError` if an option is given that a run without `--out` does not have."""
        given = [
            f"--{field.name.replace('_', '-')}"
            for field in fields(self)
            if getattr(self, field.name) != field.default and field.name != "timeout"
        ]
        if given:
            raise ConfigError(f"{', '.join(given)}: only with --out, which names the output file")

    def frames_of(self, predictor: Predictor) -> Frames:
        """The frames of a clip. Raises `ConfigError` for options that contradict one another."""
        from mplug2_fast.bulk import Frames
        from mplug2_fast.video import Windows

        if self.windows is None:
            if self.stride is not None:
                raise ConfigError("--stride: only with --windows")
            return Frames(self.frames or predictor.task.num_frames(predictor.model.config))
        if self.frames is not None:
            raise ConfigError("--frames and --windows: use one of them")
        return Frames(self.windows, Windows(self.windows, self.stride or self.windows))

    def decoding(self, device: str, videos: int, ranks: Ranks) -> Decoding:
        """The decoder for this device. Raises `ConfigError` for options that contradict one another."""
        from mplug2_fast.bulk import Decoding

        if self.decoder is Decoder.dali and (self.num_workers or self.timeout):
            raise ConfigError("--num-workers and --timeout: not with --decoder dali, which decodes in this process")
        cores = max(len(os.sched_getaffinity(0)) // ranks.local_size, 1)
        workers = self.num_workers or _usual_workers(device, cores)
        if workers > (most := min(cores, max(videos, 1))):
            if self.num_workers and ranks.rank == 0:
                reason = _counted(cores, "core", "cores") if most == cores else _counted(videos, "video", "videos")
                note(f"note: --num-workers reduced from {workers:,} to {most}: there is work for {reason} only")
            workers = most
        return Decoding(workers, self.timeout or 60.0, (self.decoder or Decoder.pyav).value)

    def batch_bytes(self) -> int | None:
        """The memory of a batch in bytes."""
        return None if self.batch_memory is None else int(self.batch_memory * 2**30)


def run_bulk(
    make_work: Callable[[Ranks, Sources], Work[Any]],
    find: Callable[[], Sources],
    out: str,
    options: BulkOptions,
    unit: str,
    source: str = "video",
) -> None:
    """Process all sources, with progress on standard error. Exits with status 2 if any failed.

    Args:
        unit: what the results are called. source: what one source is called.
    """
    from mplug2_fast import bulk

    if not out:
        raise ConfigError("--out is empty: name the output file")
    sources = find()
    with bulk.Ranks() as ranks:
        work = make_work(ranks, sources)
        first = ranks.rank == 0
        if first:
            note_skipped(sources)
        with progress(ranks, source) as started:
            summary = bulk.run(
                work,
                sources.videos,
                out,
                decoding=options.decoding(work.weights.device.type, len(sources.videos), ranks),
                batch_memory=options.batch_bytes(),
                retry_failed=options.retry_failed,
                ranks=ranks,
                started=started,
            )
    if first:
        note(_summarised(summary, out, unit, source))
        for reason in sources.unreadable:
            note(f"error: {reason}")
        if summary.failed or sources.unreadable:
            raise typer.Exit(BAD_INPUT)


def note_skipped(sources: Sources) -> None:
    if sources.repeated:
        note(f"note: ignored {_counted(sources.repeated, 'duplicate', 'duplicates')}")
    if sources.not_media:
        note(f"note: skipped {_counted(sources.not_media, 'non-media file', 'non-media files')}")
    if sources.hidden:
        note(f"note: skipped {_counted(sources.hidden, 'hidden file or folder', 'hidden files and folders')}")
    if sources.linked_again:
        links = _counted(sources.linked_again, "link to a folder", "links to folders")
        note(f"note: skipped {links} whose videos are included already")
    for folder in sources.empty:
        note(f"note: {shown(folder)}: no videos or images in this folder")


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _usual_workers(device: str, cores: int) -> int:
    """Many workers keep a GPU busy. On a CPU, the model needs most of the cores."""
    return max(1, min(cores - 1, 16) if device == "cuda" else cores // 8)


@contextmanager
def progress(ranks: Ranks, source: str = "video") -> Iterator[Callable[[Plan], Callable[[int, int], None]]]:
    """The callback for `bulk.run`: a progress bar on a terminal, otherwise a line every 30 seconds."""
    if ranks.rank:
        yield lambda plan: lambda videos, failed: None
    elif sys.stderr.isatty():
        with _bar(source) as bar:
            yield lambda plan: _Bar(bar, plan)
    else:
        yield lambda plan: _Notes(plan, source)


def _bar(source: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{source}s, {{task.fields[failed]}} failed, {{task.fields[rate]:.1f}}/s,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True),
    )


class _Bar:
    """A progress bar."""

    def __init__(self, bar: Any, plan: Plan) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=plan.left, failed=0, rate=0.0)
        self._failed = 0
        self._rate = _Rate()

    def __call__(self, videos: int, failed: int) -> None:
        self._failed += failed
        self._bar.update(self._task, advance=videos, failed=self._failed, rate=self._rate(videos))


class _Notes:
    """Lines on standard error, at the start and every `SECONDS_BETWEEN_NOTES`."""

    def __init__(self, plan: Plan, source: str) -> None:
        self._sources = f"{source}s"
        self._total = plan.left
        self._done = self._failed = 0
        self._rate = _Rate()
        self._last = time.monotonic()
        if plan.finished:
            note(f"note: {_counted(plan.finished, source, self._sources)} already done, {plan.left:,} to do")

    def __call__(self, videos: int, failed: int) -> None:
        self._done += videos
        self._failed += failed
        rate = self._rate(videos)
        if time.monotonic() - self._last >= SECONDS_BETWEEN_NOTES:
            self._last = time.monotonic()
            left = _duration((self._total - self._done) / rate) if rate else "?"
            done = f"{self._done:,} of {self._total:,} {self._sources}"
            note(f"{done}, {self._failed:,} failed, {rate:.1f}/s, {left} left")


class _Rate:
    """Videos per second since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._videos = 0

    def __call__(self, videos: int) -> float:
        self._videos += videos
        return self._videos / max(time.monotonic() - self._started, 1e-9)


def _summarised(summary: Summary, out: str, unit: str, source: str) -> str:
    good = summary.lines - summary.failed
    text = f"{shown(out)}: {good:,} {unit}, {summary.failed:,} failed"
    if not summary.videos:
        return f"{text}; nothing left to do"
    rate = summary.videos / summary.seconds
    share = summary.model_seconds / summary.seconds
    taken = f"{_counted(summary.videos, source, f'{source}s')} in {_duration(summary.seconds)}, {rate:.1f} per second"
    return f"{text}; {taken}, model busy {share:.0%} of the time"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
