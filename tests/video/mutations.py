"""Damages media files at random and decodes them in workers: `python -m tests.video.mutations --count 1000`.

Every file must be accounted for once, within its time limit, and no worker may take more memory than the limit.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mplug2_fast.video import DecodePool, Limits
from tests.video.clips import moving_frames, write_video

MEMORY = 2 * 2**30
TIMEOUT = 10.0
_SEEDS = [
    ("mp4", "libx264", {}),
    ("mp4", "libx265", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    ("mov", "mjpeg", {}),
    ("mkv", "libx264", {}),
    ("webm", "libvpx-vp9", {}),
    ("avi", "mpeg4", {}),
    ("ts", "libx264", {}),
    ("mpg", "mpeg2video", {}),
    ("flv", "flv", {}),
    ("gif", "gif", {}),
    ("apng", "apng", {}),
    ("nut", "ffv1", {}),
    ("png", "png", {}),
    ("jpg", "mjpeg", {}),
    ("bmp", "bmp", {}),
    ("webp", "libwebp", {}),
]
_STILLS = ("png", "jpg", "bmp", "webp")
_CLAIMS = (
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x00\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\0",
    b"\x80\0\0\0",
)


def seeds(folder: Path) -> list[tuple[str, bytes]]:
    """Small undamaged files: extension -> contents."""
    folder.mkdir()
    found = []
    for number, (extension, codec, options) in enumerate(_SEEDS):
        frames = moving_frames(1 if extension in _STILLS else 12)
        path = write_video(folder / f"{number}.{extension}", codec, frames, gop=6, **options)
        found.append((extension, path.read_bytes()))
    return found


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Flips bits, cuts, repeats, splices, or writes claims into the header."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind = rng.randrange(6)
        at = rng.randrange(len(changed))
        length = rng.choice((1, 8, 100, 1000))
        if kind == 0:
            for _ in range(rng.choice((1, 3, 20))):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[max(at, 16) :]
        elif kind == 2:
            changed[at:at] = changed[at : at + length] * rng.choice((1, 1, 50))
        elif kind == 3:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            changed[at : at + rng.choice((0, length))] = other[start : start + length]
        elif kind == 4:
            header = rng.randrange(min(len(changed), rng.choice((64, 512, 4096))))
            changed[header : header + 4] = rng.choice(_CLAIMS)
        else:
            changed[at : at + length] = bytes(length)
    return bytes(changed)


def mutated_files(folder: Path, count: int, seed: int) -> Iterator[Path]:
    whole = seeds(folder / "seeds")
    others = [data for _, data in whole]
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        extension, data = whole[number % len(whole)]
        path = folder / f"{number}{rng.choice(('.' + extension, '.' + extension, '', '.mp4'))}"
        path.write_bytes(mutate(data, others, rng))
        yield path


class _MemoryWatch(threading.Thread):
    """The maximum memory of any worker, sampled from the system."""

    def __init__(self, pool: DecodePool) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pool = pool
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            for pid in self._pool.pids:
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                peaks = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")]
                self.peak = max(self.peak, *peaks, 0)

    def end(self) -> int:
        self._ended.set()
        self.join()
        return self.peak


def check(folder: Path, count: int, seed: int = 0, num_workers: int = 2) -> dict[str, object]:
    """Decodes `count` mutated files and returns the run's numbers. Raises `AssertionError` if a bound is exceeded."""
    paths = list(mutated_files(folder, count, seed))
    seen: Counter[int] = Counter()
    errors: Counter[str] = Counter()
    slowest, started = (0.0, paths[0]), time.monotonic()
    limits = Limits(memory=MEMORY)
    with DecodePool(num_workers, timeout=TIMEOUT, num_frames=4, image_size=32, limits=limits) as pool:
        watch = _MemoryWatch(pool)
        watch.start()
        for clip in pool.clips(paths):
            seen[clip.index] += 1
            slowest = max(slowest, (clip.seconds, clip.source))
            if clip.error is not None:
                message = str(clip.error)
                assert message.startswith(f"{clip.source}: "), message
                assert "\n" not in message, message
                reason = message.removeprefix(f"{clip.source}: ")
                assert not re.match(r"\w+(Error|Exception)\b", reason), message
                errors[reason.split(":")[0].split("(")[0][:60]] += 1
        peak = watch.end()
    assert seen == Counter(range(count)), "a file is missing, or was given twice"
    assert peak < MEMORY, f"a worker took {peak:,} bytes"
    assert slowest[0] < TIMEOUT + 2, f"{slowest[1]} took {slowest[0]:.1f} s"
    return {
        "files": count,
        "decoded": count - sum(errors.values()),
        "errors": dict(errors.most_common()),
        "peak_megabytes": peak >> 20,
        "slowest_seconds": round(slowest[0], 2),
        "slowest": str(slowest[1]),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the files; they are deleted otherwise")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, value in check(arguments.keep or Path(folder), arguments.count, arguments.seed).items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
