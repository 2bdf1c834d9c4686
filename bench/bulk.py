"""Bulk runs: how well decoding overlaps with the model, and whether memory stays flat over many files.

    python bench/bulk.py                  # decoding alone, the model alone, both: bulk.json
    python bench/bulk.py --soak 2000      # memory over 2,000 files: bulk-soak.json

The tiny model captions clips of moving shapes with one thread, and one process decodes. Decoding alone, the model alone
on decoded clips, and the bulk run take turns; their medians count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Python puts the script's folder on the path; the packages are one level up.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

BAR = 1.15
"""The largest ratio of a bulk run's time to that of its slower half alone."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--files", type=int, default=400, help="number of files")
    parser.add_argument("--size", type=int, default=256, help="pixels per side of a clip")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--soak", type=int, metavar="FILES", help="measure memory over FILES files instead")
    parser.add_argument("--out", type=Path, help="JSON file (default: bulk.json or bulk-soak.json)")
    given = parser.parse_args(arguments)
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given.soak:
            measured = soak(Path(folder), given.soak)
        else:
            measured = overlap(Path(folder), given.files, given.size, given.repeats)
    torch.set_num_threads(threads)
    from bench import machine

    of, versions = machine.describe()
    command = " ".join(["python bench/bulk.py", *(sys.argv[1:] if arguments is None else arguments)])
    measured |= {"machine": of, "versions": versions, "command": command}
    path = given.out or Path("bulk-soak.json" if given.soak else "bulk.json")
    path.write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps({name: measured[name] for name in measured if name not in ("machine", "versions", "samples")}))
    return 0


def markdown(results: Mapping[str, Any]) -> str:
    """The results and the machine, as text."""
    of, versions = results["machine"], results["versions"]
    where = f"{of['cpu']}, {of['cores']} cores, torch {versions['torch']}: `{results['command']}`"
    if "model_share" in results:
        seconds = ", ".join(f"{name} {taken:.2f} s" for name, taken in results["seconds"].items())
        text = (
            f"{results['files']:,} clips of {results['size']} px, medians of {results['repeats']}: {seconds}. "
            f"The run takes {results['ratio']:.2f} × the slower half (target: at most {BAR}, "
            f"{'met' if results['met'] else 'missed'}). The model computes for {results['model_share']:.0%} of it."
        )
    else:
        first, last, growth = (results[name] for name in ("after_a_tenth", "at_the_end", "growth_bytes_per_file"))
        parts = [
            f"the {name} {first[part] / 1e6:.1f} MB after {first['files']:,} files, {last[part] / 1e6:.1f} MB at the "
            f"end, {growth[part]:,.0f} bytes per file"
            for part, name in (("run", "run has"), ("decoding", "decoding process"))
        ]
        text = f"{results['files']:,} files, {results['failed']:,} of them broken: {'; '.join(parts)}."
    return f"{text}\n{where}\n"


def overlap(folder: Path, files: int, size: int, repeats: int) -> dict[str, Any]:
    """Seconds of decoding alone, the model alone and the bulk run, and the share of it in which the model computes."""
    import torch

    from mplug2_fast import bulk
    from mplug2_fast.bulk.memory import MAX_BATCH
    from mplug2_fast.bulk.runs import decoder_for

    work = _work()
    videos = bulk.find_videos(write_clips(folder, files, size)).videos
    decoding = bulk.Decoding(num_workers=1)

    def decode() -> list[Any]:
        with decoder_for(work, decoding) as pool:
            return sorted(pool.clips(video.path for video in videos), key=lambda clip: clip.index)

    clips = torch.stack([clip.frames for clip in decode()]).split(MAX_BATCH["cpu"])

    def model() -> None:
        for batch in clips:
            work.compute(batch, videos[: len(batch)])

    shares = []

    def run() -> None:
        summary = bulk.run(work, videos, folder / f"{len(shares)}.jsonl", decoding=decoding)
        assert (summary.lines, summary.failed) == (files, 0)
        shares.append(summary.model_seconds / summary.seconds)

    model()
    taken: dict[str, list[float]] = {"decoding": [], "model": [], "run": []}
    for _ in range(repeats):
        for name, part in (("decoding", decode), ("model", model), ("run", run)):
            taken[name].append(_seconds(part))
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    ratios = [run / max(decoding, model) for decoding, model, run in zip(*(taken[name] for name in taken), strict=True)]
    return {
        "files": files,
        "size": size,
        "repeats": repeats,
        "seconds": medians,
        "ratio": statistics.median(ratios),
        "bar": BAR,
        "met": statistics.median(ratios) <= BAR,
        "model_share": statistics.median(shares),
        "samples": taken,
    }


def soak(folder: Path, files: int) -> dict[str, Any]:
    """The memory of the run and its decoding process, in bytes, sampled about 50 times."""
    from mplug2_fast import bulk

    work = _work()
    distinct = write_clips(folder, 50, 128)
    broken = folder / "broken.mp4"
    broken.write_bytes(Path(distinct[0]).read_bytes()[:2000])
    paths = []
    for number in range(files):
        path = folder / f"link {number:06d}.mp4"
        path.symlink_to(broken if number % 10 == 7 else distinct[number % len(distinct)])
        paths.append(str(path))
    done, samples = 0, []

    def progress(videos: int, failed: int) -> None:
        nonlocal done
        done += videos
        if done >= len(samples) * files / 50:
            samples.append({"files": done, "run": _memory(os.getpid()), "decoding": _memory(*_children())})

    videos = bulk.find_videos(paths).videos
    summary = bulk.run(work, videos, folder / "out.jsonl", started=lambda plan: progress)
    second, last = samples[len(samples) // 10], samples[-1]
    return {
        "files": files,
        "failed": summary.failed,
        "seconds": summary.seconds,
        "after_a_tenth": second,
        "at_the_end": last,
        "growth_bytes_per_file": {
            part: (last[part] - second[part]) / (last["files"] - second["files"]) for part in ("run", "decoding")
        },
        "samples": samples,
    }


def _work() -> Any:
    import mplug2_fast as mf
    from mplug2_fast import bulk

    captioner = mf.Captioner(device="cpu")
    frames = bulk.Frames(captioner.model.config.vision.num_frames)
    return bulk.Predict(captioner, frames, captioner.generation_options(None, 1, None, None))


def write_clips(folder: Path, count: int, size: int, frames: int = 16) -> list[str]:
    """Clips of moving shapes, each of another scene. More frames make the motion slower."""
    import numpy as np

    from examples.moving_shapes.generator import held_out_scenes, render, write_clip
    from examples.moving_shapes.generator.render import CLIP_FRAMES, to_uint8

    scenes = held_out_scenes(count)
    times = np.array_split(np.linspace(0, CLIP_FRAMES - 1, frames), -(-frames // CLIP_FRAMES))
    paths = []
    for number in range(count):
        scene = scenes[number : number + 1]
        pixels = np.concatenate([to_uint8(render(scene, part, np.arange(size), size))[0] for part in times])
        paths.append(str(folder / f"clip {number:05d}.mp4"))
        write_clip(paths[-1], pixels)
    return paths


def _seconds(part: Callable[[], object]) -> float:
    started = time.perf_counter()
    part()
    return time.perf_counter() - started


def _children() -> list[int]:
    """The child processes."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


def _memory(*processes: int) -> int:
    """Their private resident memory in bytes."""
    total = 0
    for process in processes:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
    return total


if __name__ == "__main__":
    from bench import guard

    sys.exit(guard.run(main))
