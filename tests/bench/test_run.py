"""The benchmark as it is called, at its smallest."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cli, table
from bench.workers import Client, WorkerError
from mplug2_fast import MPlug2Config

ROOT = Path(__file__).parents[2]
ROW = [
    *("level", "name", "implementation", "dtype", "device", "seconds", "gflops", "percent_of_ceiling", "x_reference"),
    *("x_compiled", "peak_memory_bytes", "relative_error", "backend", "command"),
]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A finished run and its results. The reference decodes fewer steps than the others."""
    target = tmp_path_factory.mktemp("bench") / "results.json"
    options = ["--quick", "--peer", "uncompiled", "--repeats", "1", "--steps", "3", "--reference-steps", "2"]
    done = subprocess.run(
        [sys.executable, "bench/run.py", *options, "--frames", "2", "--json", str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done, json.loads(target.read_text())


def test_json(quick):
    _, results = quick
    assert list(results) == ["machine", "versions", "ceilings", "rows"]
    assert {"cpu", "cores", "threads", "simd", "memory_bytes", "os", "gpu"} <= results["machine"].keys()
    assert {"torch", "python", "mplug2_fast", "commit"} <= results["versions"].keys()
    assert results["ceilings"]["gemm"]["float32"]["gflops"] > 0
    assert results["ceilings"]["copy_gb_per_second"] > 0
    assert all(list(row) == ROW for row in results["rows"])
    kinds = ["reference", "fast", "uncompiled"]
    expected = [(level, kind) for level in ("vision", "universal", "decode", "captioning") for kind in kinds]
    assert [(row["level"], row["implementation"]) for row in results["rows"] if row["level"] != "loading"] == expected


def test_figures_agree_with_one_another(quick):
    _, results = quick
    ceiling = results["ceilings"]["gemm"]["float32"]["gflops"]
    rows = {(row["level"], row["implementation"]): row for row in results["rows"]}
    for (level, kind), row in rows.items():
        if level == "loading":
            continue
        assert row["percent_of_ceiling"] == pytest.approx(100 * row["gflops"] / ceiling)
        assert row["x_reference"] == pytest.approx(rows[level, "reference"]["seconds"] / row["seconds"])
        assert row["x_compiled"] == pytest.approx(rows[level, "uncompiled"]["seconds"] / row["seconds"])
        assert row["peak_memory_bytes"] > 50e6
        if level in ("vision", "universal") or kind == "reference":
            assert row["relative_error"] < 1e-4


def test_a_reference_at_fewer_steps_is_marked_and_compared_with_nothing(quick):
    done, results = quick
    for row in results["rows"]:
        if row["level"] in ("decode", "captioning"):
            steps = "2 of 3 steps" if row["implementation"] == "reference" else "3 steps"
            assert row["name"] == f"tiny, 2 frames, 5 beams, {steps}"
            assert row["relative_error"] == (0.0 if row["implementation"] == "reference" else None)
            assert "--reference-steps 2" in row["command"]
    assert "reference *" in done.stdout
    assert "≥" in done.stdout
    assert "2 of 3 steps" in done.stdout


def test_table_and_progress(quick):
    done, _ = quick
    for word in ("× reference", "× compiled peer", "peak memory", "relative error", "% of GEMM", "peer, not compiled"):
        assert word in done.stdout
    assert "red_square_moves_left.mp4" in done.stdout or "no video: av is not installed" in done.stdout
    assert "captioning · fast float32 · run 1 of 1" in done.stderr


def test_full_steps_have_no_mark():
    row = {"level": "decode", "implementation": "reference", "name": "tiny, 5 steps"}
    rows, meaning = table.marked([row, {**row, "implementation": "fast"}])
    assert meaning is None
    assert rows == [row, {**row, "implementation": "fast"}]


def test_defaults_and_lists():
    plan, target = cli.parse([])
    assert (plan.preset, plan.dtypes, plan.frames, plan.beams, plan.steps) == ("base", ("float32",), 16, 5, 15)
    assert (plan.peer, target) == ("frozen", None)
    plan, _ = cli.parse(["--quick", "--dtype", "bfloat16,float32", "--level", "decode", "--level", "vision"])
    assert (plan.preset, plan.frames, plan.dtypes) == ("tiny", 4, ("bfloat16", "float32"))
    assert plan.levels == ("vision", "decode")
    assert plan.peer == "compiled"
    assert cli.parse(["--no-peer"])[0].peer is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "float8"], "float8"),
        (["--level", "vision,sound"], "sound"),
        (["--steps", "600"], "512"),
        (["--steps", "3", "--reference-steps", "4"], "--reference-steps"),
        (["--frames", "0"], "--frames"),
    ],
)
def test_impossible_options(options, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(options)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_the_reference_before_and_after_it_is_accelerated(tmp_path):
    target = tmp_path / "results.json"
    options = ["--quick", "--accelerate", "--level", "captioning", "--repeats", "1", "--steps", "3", "--frames", "2"]
    assert cli.main([*options, "--json", str(target)]) == 0
    rows = [row for row in json.loads(target.read_text())["rows"] if row["level"] != "loading"]
    assert [row["implementation"] for row in rows] == ["reference", "accelerated"]
    assert rows[1]["x_reference"] == pytest.approx(rows[0]["seconds"] / rows[1]["seconds"])
    assert rows[1]["relative_error"] < 1e-4
    assert "--accelerate" in rows[1]["command"]
    assert "--no-peer" not in rows[1]["command"]
    cli.parse(shlex.split(rows[1]["command"])[2:])


def test_a_video_that_cannot_be_read_is_one_line(tmp_path, capsys):
    assert cli.main(["--quick", "--video", str(tmp_path / "none.npy")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "none.npy" in error
    assert len(error.splitlines()) == 1


def test_memory_decides_what_runs_side_by_side():
    plan, _ = cli.parse(["--preset", "large", "--dtype", "float32,bfloat16"])
    assert plan.groups(32 << 30) == [("float32", "bfloat16")]
    assert plan.groups(12 << 30) == [("float32",), ("bfloat16",)]


def test_a_worker_that_fails_says_why(tmp_path):
    config = MPlug2Config.preset("tiny").to_dict()
    sizes = {
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "beams": 1,
        "steps": 1,
        "exchange": str(tmp_path),
        "config": config,
    }
    with pytest.raises(WorkerError, match="slow float32: KeyError: 'slow'"):
        Client({"implementation": "slow", **sizes}, "slow float32")
    torch.save(torch.zeros(1, 3, 1, 16, 16), tmp_path / "video.pt")
    with (
        Client({"implementation": "fast", **sizes}, "fast float32") as client,
        pytest.raises(WorkerError, match=r"fast float32: ValueError: .*32×32"),
    ):
        client.call("run", "vision")


def test_a_worker_that_dies_is_noticed():
    with Client({"implementation": "ceilings", "threads": 1}, "ceilings") as client:
        client.process.kill()
        with pytest.raises(WorkerError, match="ceilings: the process was killed"):
            client.call("measure")
