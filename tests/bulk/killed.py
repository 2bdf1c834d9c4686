"""Starts a bulk run repeatedly and kills it each time, then lets it finish.

    python tests/bulk/killed.py caption|features PATHS_FILE OUTPUT KILLS SEED WHOLE

The model is loaded once: each run is a fork, which is a process like any other to SIGKILL. At the end a run that is not
killed writes to WHOLE. Prints how many lines there were at each kill.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mplug2_fast as mf
from mplug2_fast import bulk
from mplug2_fast.bulk.features import Shards


def main(command: str, paths_file: str, output: str, kills: int, seed: int, whole: str) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    moments = random.Random(seed)
    paths = Path(paths_file).read_text().split("\n")
    captioner = mf.Captioner(device="cpu")
    options = captioner.generation_options(2, 1, None, 6)
    Shards.is_due = lambda shards: len(shards._rows) >= 4  # many small ones

    def run(output: str) -> None:
        if command == "caption":
            work = bulk.Predict(captioner, bulk.Frames(4), options)
        else:
            work = bulk.Features(captioner, bulk.Frames(4), "universal", "safetensors", Path(output).parent)
        bulk.run(work, bulk.find_videos(paths).videos, output, batch_memory=6 * work.bytes_of_clip())

    killed = []
    while len(killed) < kills:
        before = lines(output)
        process = os.fork()
        if process == 0:
            run(output)
            os._exit(0)
        # Anywhere: before the first line, between two lines, in the middle of decoding, computing or writing. Each run
        # may do its share of what is left, so that there is something to kill for the last of them.
        share = (len(paths) - before) // (kills - len(killed) + 1)
        target = before + moments.randint(0, share)
        wait_for(lambda target=target: lines(output) >= target)
        end = time.monotonic() + moments.random() * 0.2
        wait_for(lambda end=end, most=before + share: time.monotonic() > end or lines(output) >= most)
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), "the run came to its end"
        killed.append(lines(output))
    run(output)
    run(whole)
    print(*killed)


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, "the run does not get on"
        time.sleep(0.001)


def lines(output: str) -> int:
    return Path(output).read_bytes().count(b"\n") if Path(output).exists() else 0


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
