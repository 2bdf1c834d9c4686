"""A bulk run: worker processes decode videos, the model computes batches, and the results become lines of a journal.

    sources -> DecodePool or DaliLoader -> batches, in a thread -> Work.compute -> Finished videos -> lines -> Journal

If N programs share a run, each computes every N-th batch. The first one locks the output. The others write parts, which
are journals beside the output. The first program moves the parts into the output: those of an earlier run at the start,
those of this run at the end.

A video may be intact although its decoder was killed or timed out: another video may have used up the memory, or
somebody may have killed the process. Such videos are retried once, one at a time, after all others.
"""

from __future__ import annotations

import glob
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from mplug2_fast.bulk.batches import Ahead, Batch, batches_of_videos, batches_of_windows, in_groups, joined
from mplug2_fast.bulk.journal import Journal, Line, read_lines
from mplug2_fast.bulk.memory import batch_size
from mplug2_fast.bulk.ranks import Ranks
from mplug2_fast.bulk.sources import Source
from mplug2_fast.bulk.work import Finished, Work
from mplug2_fast.errors import ConfigError, MPlug2Error
from mplug2_fast.predict.memory import is_out_of_memory, require_memory
from mplug2_fast.video import Clip, DaliLoader, DecodePool
from mplug2_fast.video.preparation import MPLUG2

_LINES_AT_ONCE = 1000

PREFETCH = 4
"""Clips per worker that may wait for this process, so that workers need not wait for it."""

Progress = Callable[[int, int], None]
"""Called with the number of newly finished videos and how many of them failed."""


@dataclass(frozen=True)
class Decoding:
    """How files are decoded.

    num_workers: decoding processes. timeout: seconds per clip, None for no limit.
    backend: "pyav", "torchcodec" or "dali". DALI decodes on the GPU, in this process and without a timeout.
    """

    num_workers: int = 1
    timeout: float | None = 60.0
    backend: str = "pyav"


@dataclass(frozen=True)
class Plan:
    """One program's share of a run.

    groups: numbers of videos. Each group is a batch. batch_size: clips per batch.
    left: videos that this program has to finish. finished: videos of the whole run that earlier runs finished.
    """

    groups: list[list[int]]
    batch_size: int
    left: int
    finished: int


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    lines, failed: all lines and how many are errors, including those of earlier runs.
    videos, seconds: videos that this run finished, and its duration.
    model_seconds: the time in which the model computed, averaged over the programs.
    """

    lines: int = 0
    failed: int = 0
    videos: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0


def run(
    work: Work[Any],
    videos: Sequence[Source],
    output: str | os.PathLike[str],
    *,
    decoding: Decoding | None = None,
    batch_memory: int | None = None,
    retry_failed: bool = False,
    ranks: Ranks | None = None,
    started: Callable[[Plan], Progress] | None = None,
) -> Summary:
    """Processes the videos, or resumes an earlier run, and writes the lines to the output.

    Args:
        work: what is computed. videos: without duplicates. output: the journal.
        decoding: see `Decoding`.
        batch_memory: bytes for a batch. None: as the run was started with, or else a share of the free memory.
        retry_failed: also retry the videos that an earlier run recorded as failed, for whatever reason.
        ranks: the programs that share the run, already entered. None: only this program.
        started: called with the plan before the first batch. Returns the progress callback.

    Raises:
        ConfigError: the output belongs to another run, is locked, or cannot be written.
        MPlug2Error: the results cannot be written, or a single clip is too large for the device.
    """
    ranks = ranks or Ranks({})
    output = os.fspath(output)
    work.require_files(videos)
    decoding = decoding or Decoding()
    settings = {**work.settings(), "decoder": decoding.backend}
    require_memory(f"{work.frames.length:,} frames", work.bytes_of_clip(), work.weights.device)
    size = batch_size(work.bytes_of_clip(), work.weights.device, batch_memory)
    with ExitStack() as stack:
        opened: list[Journal] = []

        def open_output() -> _Shared:
            journal = stack.enter_context(
                Journal(output, work.key, settings, {"batch_size": size}, guarded=work.guarded)
            )
            opened.append(journal)
            _take_in_parts(journal, work, settings)
            work.tidy(journal)
            if retry_failed:
                journal.drop_failed(key for video in videos for key in work.keys(video))
            kept = journal.choices["batch_size"] if batch_memory is None else size
            done = bytes(all(key in journal.done for key in work.keys(video)) for video in videos)
            return _Shared(_digest(videos), done, kept)

        shared = ranks.first_makes(open_output)
        if shared.videos != _digest(videos):
            raise ConfigError("the programs of this run find different files: all need the same folders and lists")
        if not os.path.exists(output):
            raise ConfigError(
                f"{output}: the first program's output does not exist here: all programs need a shared folder for it"
            )
        plan = _plan(work, shared, ranks)
        if ranks.rank == 0:
            result = _work_off(work, videos, opened[0], plan, ranks.rank, decoding, started)
        else:
            with Journal(_part(output, ranks.rank), work.key, settings, guarded=work.guarded) as journal:
                result = _work_off(work, videos, journal, plan, ranks.rank, decoding, started)
        results = ranks.gather(result)

        def close_output() -> tuple[int, int]:
            journal = opened[0]
            if ranks.size > 1:
                _take_in_parts(journal, work, settings)
            keys = [key for video in videos for key in work.keys(video)]
            return len(keys), sum(journal.done[key] for key in keys)

        lines, failed = ranks.first_makes(close_output)
        return Summary(
            lines,
            failed,
            videos=sum(result.videos for result in results),
            seconds=max(result.seconds for result in results),
            model_seconds=sum(result.model_seconds for result in results) / len(results),
        )


@dataclass(frozen=True)
class _Shared:
    """What the first program sends to the others."""

    videos: str
    """A digest of the list of videos."""
    done: bytes
    """One byte per video: whether all of its lines exist."""
    batch_size: int


def _plan(work: Work[Any], shared: _Shared, ranks: Ranks) -> Plan:
    """This program's share. A group with any unfinished video is computed as a whole: see `batches`."""
    done = shared.done
    together = 1 if work.frames.windows is not None else shared.batch_size
    groups = [
        list(group)
        for number, group in enumerate(in_groups(len(done), together))
        if number % ranks.size == ranks.rank and not all(done[video] for video in group)
    ]
    left = sum(not done[video] for group in groups for video in group)
    return Plan(groups, shared.batch_size, left, sum(done))


def _work_off(
    work: Work[Any],
    videos: Sequence[Source],
    journal: Journal,
    plan: Plan,
    rank: int,
    decoding: Decoding,
    started: Callable[[Plan], Progress] | None,
) -> Summary:
    """Decodes, computes and writes what is planned."""
    progress = started(plan) if started is not None else lambda videos, failed: None
    begun = time.perf_counter()
    model_seconds = 0.0
    count = 0
    work.begin(rank)
    for step in _steps_with_retries(work, videos, plan, decoding):
        new = {number for number in step.lines if any(key not in journal.done for key in work.keys(videos[number]))}
        work.write([line for number in sorted(step.lines) for line in step.lines[number]], journal)
        model_seconds += step.seconds
        count += len(new)
        progress(len(new), len(new & step.failed))
    work.flush(journal)
    return Summary(videos=count, seconds=time.perf_counter() - begun, model_seconds=model_seconds)


@dataclass(frozen=True)
class Step:
    """The result of a batch.

    lines: of the videos that it finished, by their numbers. failed: which of them failed.
    seconds: the time in which the model computed.
    """

    lines: dict[int, list[Line]]
    failed: set[int]
    seconds: float


def _steps_with_retries(work: Work[Any], videos: Sequence[Source], plan: Plan, decoding: Decoding) -> Iterator[Step]:
    """All batches of a plan, then the retries."""
    again: list[int] = []
    yield from steps(work, videos, _decoded(work, videos, plan, decoding), again)
    yield from retries(work, videos, sorted(again), decoding, plan.batch_size)


def retries(
    work: Work[Any], videos: Sequence[Source], numbers: Sequence[int], decoding: Decoding, batch_size: int = 1
) -> Iterator[Step]:
    """Retries videos one at a time, in a new process, so that a file which kills its decoder affects no other."""
    plan = Plan([[number] for number in numbers], batch_size, left=len(numbers), finished=0)
    yield from steps(work, videos, _decoded(work, videos, plan, replace(decoding, num_workers=1), prefetch=1))


def steps(
    work: Work[Any], videos: Sequence[Source], batches: Iterable[Batch], again: list[int] | None = None
) -> Iterator[Step]:
    """Computes batches of the videos.

    Args:
        again: collects the numbers of videos with a transient error, which get no lines. None: they count as failed.
    """
    unfinished: dict[int, Finished[Any]] = {}
    for batch in batches:
        begun = time.perf_counter()
        outcomes, stages = _computed(work, batch.clips, videos)
        seconds = time.perf_counter() - begun
        lines: dict[int, list[Line]] = {}
        for clip in batch.failed:
            unfinished.pop(clip.index, None)
            if clip.transient and again is not None:
                again.append(clip.index)
            else:
                lines[clip.index] = work.error_lines(videos[clip.index], clip)
        failed = set(lines)
        for clip, outcome in zip(batch.clips, outcomes, strict=True):
            video = unfinished.setdefault(clip.index, Finished(videos[clip.index]))
            video.add(clip, outcome, {stage: taken / len(outcomes) for stage, taken in stages.items()})
            if clip.last:
                lines[clip.index] = work.lines(unfinished.pop(clip.index))
                if any(line["error"] is not None for line in lines[clip.index]):
                    failed.add(clip.index)
        yield Step(lines, failed, seconds)


def _decoded(
    work: Work[Any], videos: Sequence[Source], plan: Plan, decoding: Decoding, prefetch: int = PREFETCH
) -> Iterator[Batch]:
    """The batches of a plan."""
    numbers = [number for group in plan.groups for number in group]
    if not numbers:
        return
    decoding = replace(decoding, num_workers=min(decoding.num_workers, len(numbers)))
    with Ahead() as ahead, decoder_for(work, decoding, prefetch) as decoder:
        owners, files = zip(*((number, file) for number in numbers for file in videos[number].files), strict=True)
        clips = joined(decoder.clips(iter(files)), owners)
        if work.frames.windows is not None:
            yield from ahead.of(batches_of_windows(clips, plan.batch_size))
        else:
            yield from ahead.of(batches_of_videos(clips, plan.groups))


class NoFiles:
    """Replaces the decoder for texts alone: yields clips without frames."""

    def clips(self, sources: Iterable[str]) -> Iterator[Clip]:
        """One empty clip per source, in order."""
        for index, source in enumerate(sources):
            yield Clip(index, source, torch.empty(0))


def decoder_for(
    work: Work[Any], decoding: Decoding, prefetch: int = PREFETCH
) -> AbstractContextManager[DecodePool | DaliLoader | NoFiles]:
    """The decoder for a work, as a context manager. If the model is on the CPU, each process decodes with one thread.

    Raises:
        ConfigError: DALI does not decode windows, and serves no other preparation than mPLUG-2's.
        BackendError: the backend is not available.
    """
    if not work.reads_files:
        return nullcontext(NoFiles())
    device = work.weights.device
    options = {"num_frames": work.frames.count, "image_size": work.image_size, "dtype": work.weights.dtype}
    if decoding.backend == "dali":
        if work.frames.windows is not None:
            raise ConfigError("DALI does not decode windows: use the decoder pyav or torchcodec")
        if work.preparation != MPLUG2:
            raise ConfigError("DALI prepares frames for mPLUG-2 only: use the decoder pyav or torchcodec")
        return nullcontext(DaliLoader(device, **options))
    return DecodePool(
        decoding.num_workers,
        timeout=decoding.timeout,
        backend=decoding.backend,
        windows=work.frames.windows,
        prefetch=prefetch,
        threads=1 if device.type == "cpu" else None,
        preparation=work.preparation,
        **options,
    )


def _computed(work: Work[Any], clips: list[Clip], videos: Sequence[Source]) -> tuple[list[Any], dict[str, float]]:
    """The outcome of each clip, and the seconds by stage. Splits a batch that is too large for the device in halves."""
    if not clips:
        return [], {}
    try:
        return work.compute(torch.stack([clip.frames for clip in clips]), [videos[clip.index] for clip in clips])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        device = work.weights.device
        if len(clips) == 1:
            raise MPlug2Error(f"{device} ran out of memory for one clip: use a smaller dtype or fewer beams") from error
    warnings.warn(f"a batch of {len(clips)} clips is too large for {device}: see --batch-memory", stacklevel=2)
    torch.cuda.empty_cache()
    half = len(clips) // 2
    (first, one), (second, two) = _computed(work, clips[:half], videos), _computed(work, clips[half:], videos)
    return first + second, {stage: one[stage] + two[stage] for stage in one}


def _take_in_parts(journal: Journal, work: Work[Any], settings: dict[str, Any]) -> None:
    """Moves the lines of all parts into the journal."""
    for path in sorted(glob.glob(f"{glob.escape(journal.path)}.part-[0-9]*[0-9]")):
        with Journal(path, work.key, settings, guarded=work.guarded) as part:
            work.tidy(part)
            lines = read_lines(path)
            while some := list(islice(lines, _LINES_AT_ONCE)):
                journal.append(some)
            journal.sync()
            part.remove()


def _part(output: str, rank: int) -> str:
    return f"{output}.part-{rank:05d}"


def _digest(videos: Sequence[Source]) -> str:
    digest = hashlib.sha256()
    for video in videos:
        digest.update(repr(video).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
