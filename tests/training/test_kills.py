"""Two ranks, killed ten times at random moments, end with the weights of a run that was not."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.ranks import launcher

STEPS, KILLS = 300, 10


def start(folder):
    command = [*launcher(), "tests.training.ranks", str(folder), "long"]
    errors = folder.with_suffix(".err").open("a")
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=errors, stderr=errors)


def steps_done(folder):
    log = folder / "long" / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def family(pid):
    """A process and all its descendants. torchrun gives each rank a session, so there is no group to kill."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def kill(process):
    for pid in family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_kills(tmp_path):
    assert start(tmp_path / "whole").wait() == 0
    killed, rng, kills = tmp_path / "killed", random.Random(0), 0
    for number in range(KILLS):
        process = start(killed)
        until = (number + rng.random()) * STEPS / (KILLS + 1)
        while steps_done(killed) < until and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.3)
        assert process.poll() is None, killed.with_suffix(".err").read_text()[-3000:]
        kills += 1
        kill(process)
    assert kills == KILLS
    assert start(killed).wait() == 0
    name = "long/model/model.safetensors"
    assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (killed / "long/log.jsonl").read_text() == (tmp_path / "whole/long/log.jsonl").read_text()
    print(f"{kills} kills, {STEPS} steps", file=sys.stderr)
