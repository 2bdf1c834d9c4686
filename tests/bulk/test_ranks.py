"""Runs shared by several programs, as torchrun starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mplug2_fast import bulk
from mplug2_fast.bulk import runs
from mplug2_fast.bulk.journal import Journal
from mplug2_fast.cli import app
from mplug2_fast.errors import ConfigError
from mplug2_fast.video import Windows
from tests.bulk.files import mixed_files
from tests.bulk.test_run import FRAMES, OPTIONS, budget, captioner, clips, videos, without_seconds

__all__ = ["captioner", "clips"]  # fixtures

ROOT = Path(__file__).parents[2]
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def captioning(paths: list[str], out: Path) -> list[str]:
    """The arguments of the command."""
    options = ["--num-beams", "2", "--max-length", "6", "--batch-memory", "0.001", "--num-workers", "1"]
    return ["caption", *paths, "--out", str(out), "--device", "cpu", *options]


def start(paths: list[str], out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mplug2_fast", *captioning(paths, out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def ranks_of(torchrun: subprocess.Popen) -> dict[int, int]:
    """The process of each rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == torchrun.pid:
                found |= {int(v[5:]): int(folder.name) for v in variables if v.startswith(b"RANK=")}
    return found


@pytest.mark.parametrize("programs", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_two_programs_one_of_them_killed(programs: int, tmp_path: Path) -> None:
    """One or two programs process the rest."""
    (tmp_path / "files").mkdir()
    paths, broken = mixed_files(tmp_path / "files", good=27, broken=3)
    out = tmp_path / "a.jsonl"
    part = tmp_path / "a.jsonl.part-00001"

    torchrun = start(paths, out)
    deadline = time.monotonic() + 200
    while not (part.exists() and part.read_bytes().count(b"\n") >= 2 and out.read_bytes().count(b"\n") >= 2):
        assert torchrun.poll() is None, torchrun.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(ranks_of(torchrun)[1], signal.SIGKILL)
    torchrun.stderr.close()
    assert torchrun.wait(timeout=100) != 0
    before = {json.loads(line)["path"]: line for file in (out, part) for line in file.read_text().splitlines()[:-1]}
    assert 2 <= len(before) < 30

    if programs == 1:
        messages = CliRunner().invoke(app, captioning(paths, out)).stderr
    else:
        _, messages = start(paths, out).communicate(timeout=200)
    assert f"{out}: 27 captions, 3 failed; " in messages
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 30
    assert {line["path"] for line in lines} == set(paths)
    assert {line["path"] for line in lines if line["error"]} == broken
    assert set(before.values()) <= set(out.read_text().splitlines())  # nothing that was finished was done again
    assert {path.name for path in tmp_path.iterdir()} == {"files", "a.jsonl", "a.jsonl.run"}


def test_parts_that_were_left_are_taken_in_by_one_program(captioner, clips: list[str], tmp_path: Path) -> None:
    work = bulk.Predict(captioner, FRAMES, OPTIONS)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    bulk.run(work, videos(clips), whole, batch_memory=budget(work, 1))
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    for rank, finished in ((1, lines[:2]), (3, lines[1:4])):  # one line is in both
        with Journal(runs._part(str(out), rank), work.key, {**work.settings(), "decoder": "pyav"}) as part:
            part.append(finished)
    (tmp_path / "a.jsonl.part-other").touch()
    summary = bulk.run(work, videos(clips), out, batch_memory=budget(work, 1))
    assert (summary.lines, summary.videos) == (5, 1)
    assert without_seconds(out) == without_seconds(whole)
    assert sorted(path.name for path in tmp_path.glob("a.*")) == ["a.jsonl", "a.jsonl.part-other", "a.jsonl.run"]


def test_a_part_that_is_still_being_written_keeps_others_out(captioner, clips: list[str], tmp_path: Path) -> None:
    work = bulk.Predict(captioner, FRAMES, OPTIONS)
    out = str(tmp_path / "a.jsonl")
    with (
        Journal(runs._part(out, 1), work.key, {**work.settings(), "decoder": "pyav"}),
        pytest.raises(ConfigError, match="part-00001: another run is writing to it"),
    ):
        bulk.run(work, videos(clips), out)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("windows", [False, True])
def test_programs_share_what_is_left_and_leave_nothing_out(captioner, size: int, windows: bool) -> None:
    frames = bulk.Frames(4, Windows(4, 4)) if windows else FRAMES
    work = bulk.Predict(captioner, frames, OPTIONS)
    done = bytes([1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0])
    shared = runs._Shared("", done, 3)
    plans = []
    for rank in range(size):
        ranks = bulk.Ranks({**TORCHRUN, "RANK": str(rank), "WORLD_SIZE": str(size)} if size > 1 else {})
        plans.append(runs._plan(work, shared, ranks))
    groups = [tuple(group) for plan in plans for group in plan.groups]
    expected = [(2,), (3,), (7,), (8,), (10,)] if windows else [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10)]
    assert sorted(groups) == expected  # the same, however many programs there are
    assert sum(plan.left for plan in plans) == 5
    assert {plan.finished for plan in plans} == {6}


def test_who_a_program_is(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, second = bulk.Ranks({}), bulk.Ranks(TORCHRUN)
    assert (alone.rank, alone.size, second.rank, second.size) == (0, 1, 1, 2)
    with alone:
        assert (alone.gather(3), alone.first_makes(lambda: 4)) == ([3], 4)
    assert (second.device("cpu"), second.device("auto"), alone.device("auto")) == ("cpu", "cpu", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (second.device("auto"), alone.device("auto")) == ("cuda:1", "auto")
    with pytest.raises(
        ConfigError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not set, although RANK, WORLD_SIZE are"
    ):
        bulk.Ranks({"RANK": "0", "WORLD_SIZE": "2"})
    for name, value, allowed in (
        ("RANK", "first", "from 0 to 1"),
        ("RANK", "2", "from 0 to 1"),
        ("RANK", "-1", "from 0 to 1"),
        ("WORLD_SIZE", "0", "at least 1"),
        ("LOCAL_RANK", "-1", "at least 0"),
        ("MASTER_PORT", "65536", "from 0 to 65535"),
        ("LOCAL_WORLD_SIZE", "0", "at least 1"),
        ("LOCAL_WORLD_SIZE", "", "at least 1"),
    ):
        with pytest.raises(ConfigError, match=f"{name} must be a number, {allowed}, not "):
            bulk.Ranks({**TORCHRUN, name: value})
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE must be"):
        bulk.Ranks({"LOCAL_WORLD_SIZE": "0"})
    assert (bulk.Ranks({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}).local_size, second.local_size) == (2, 1)


def test_programs_that_do_not_see_the_same_are_refused(captioner, clips: list[str], tmp_path: Path) -> None:
    class Second(bulk.Ranks):
        """A rank that gets its values from the first program."""

        def first_makes(self, make: object) -> runs._Shared:
            return self.shared

    second = Second(TORCHRUN)
    work = bulk.Predict(captioner, FRAMES, OPTIONS)
    for digest, message in (("other", "find different files"), (runs._digest(videos(clips)), "does not exist here")):
        second.shared = runs._Shared(digest, bytes(5), 2)
        with pytest.raises(ConfigError, match=message):
            bulk.run(work, videos(clips), tmp_path / "a.jsonl", ranks=second)
    assert list(tmp_path.iterdir()) == []
