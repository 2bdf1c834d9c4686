"""Runs that are killed repeatedly with SIGKILL: in the end every input has one line, the right one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mplug2_fast import bulk
from tests.bulk.files import mixed_files

PROGRAM = Path(__file__).with_name("killed.py")


def results(path: Path) -> list[dict]:
    """The lines without their times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def run(command: str, folder: Path, paths: list[str], output: Path, kills: int, seed: int, whole: Path) -> list[int]:
    """The number of lines at each kill."""
    (folder / "paths").write_text("\n".join(paths))
    program = [sys.executable, str(PROGRAM), command, str(folder / "paths"), str(output), str(kills), str(seed)]
    program.append(str(whole))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    return [int(count) for count in done.stdout.split()]


@pytest.mark.parametrize(("good", "bad", "kills"), [(30, 4, 4), pytest.param(180, 20, 10, marks=pytest.mark.soak)])
def test_captions_of_a_run_that_is_killed(tmp_path: Path, good: int, bad: int, kills: int) -> None:
    (tmp_path / "files").mkdir()
    paths, broken = mixed_files(tmp_path / "files", good=good, broken=bad)
    seed = random.SystemRandom().randrange(2**32)
    whole = tmp_path / "whole.jsonl"
    killed_at = run("caption", tmp_path, paths, tmp_path / "killed.jsonl", kills, seed, whole)
    assert len(killed_at) == kills
    assert killed_at == sorted(killed_at), f"lines got lost, seed {seed}"
    assert killed_at[-1] < len(paths)

    found = results(tmp_path / "killed.jsonl")
    assert len(found) == len(paths), f"seed {seed}"
    assert {line["path"] for line in found} == set(paths), f"seed {seed}"
    assert {line["path"] for line in found if line["error"] is not None} == broken
    assert all((line["text"] is None) == (line["path"] in broken) for line in found)

    by_path = [sorted(lines, key=lambda line: line["path"]) for lines in (found, results(whole))]
    assert by_path[0] == by_path[1], f"seed {seed}"  # to the last digit of every score
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("killed")} == {
        "killed.jsonl",
        "killed.jsonl.run",
    }


def test_features_of_a_run_that_is_killed(tmp_path: Path) -> None:
    for name in ("files", "killed", "whole"):
        (tmp_path / name).mkdir()
    paths, broken = mixed_files(tmp_path / "files", good=24, broken=3)
    seed = random.SystemRandom().randrange(2**32)
    killed, whole = (tmp_path / name / "index.jsonl" for name in ("killed", "whole"))
    run("features", tmp_path, paths, killed, 3, seed, whole)

    lines = results(killed)
    assert sorted(line["path"] for line in lines) == sorted(paths), f"seed {seed}"
    assert {line["path"] for line in lines if line["error"] is not None} == broken
    named = {piece["shard"] for line in lines for piece in line["features"]}
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {*named, "index.jsonl", "index.jsonl.run"}
    killed, whole = (dict(bulk.read_features(index.parent)) for index in (killed, whole))
    assert killed.keys() == whole.keys() == set(paths) - broken
    assert all(torch.equal(killed[path], whole[path]) for path in whole), f"seed {seed}"
