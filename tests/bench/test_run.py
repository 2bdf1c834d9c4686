"""The command line at its smallest."""

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import cli, compare, measure, runner, scaling, waterfall
from bench.row import Results
from tests.bench.test_targets import CEILINGS

ROOT = Path(__file__).parents[2]
SMALL = ["--quick", "--baselines", "reference,eager", "--repeats", "1", "--steps", "3", "--frames", "2"]
WORKS = {"ops": "layer_norm", "modules": "fusion layer", "model": "captioning", "video": "decoding"}
NAMES = list(WORKS.values())
MEASURING = [(runner, "measure_ceilings"), (runner, "run"), (measure, "run"), (scaling, "run"), (waterfall, "run")]
"""All functions that time something."""


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A finished run of one work of each level but training, with all that it writes."""
    folder = tmp_path_factory.mktemp("bench")
    written = ["--json", str(folder / "run.json"), "--csv", str(folder / "run.csv"), "--pictures", str(folder)]
    done = subprocess.run(
        [sys.executable, "bench/run.py", *SMALL, "--only", ",".join(NAMES), *written],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done, folder


def test_every_level_has_its_rows(quick):
    results = Results.read(quick[1] / "run.json")
    assert [(row.key.level, row.key.name) for row in results.rows] == list(WORKS.items())
    assert {"cpu", "cores", "threads", "simd", "memory_bytes", "os", "gpu"} <= results.machine.keys()
    assert {"torch", "python", "mplug2_fast", "commit"} <= results.versions.keys()
    assert results.failed == {}
    for row in results.rows:
        assert row.correct
        assert row.ratio("reference") > 0
        assert row.peak_memory_bytes is None or row.peak_memory_bytes > 50e6
        assert row.backend


def test_shares_are_of_the_ceilings_of_the_whole_run(quick):
    results = Results.read(quick[1] / "run.json")
    rate, copy = results.ceilings["gemm"]["float32"]["gflops"] * 1e9, results.ceilings["copy_gb_per_second"] * 1e9
    for row in results.rows:
        least = max((row.flop or 0) / rate, (row.bytes or 0) / copy)
        if least:
            assert row.percent_of_ceiling == pytest.approx(100 * least / row.seconds)
        else:
            assert row.percent_of_ceiling is None


def test_csv_and_picture(quick):
    with (quick[1] / "run.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == NAMES
    assert float(rows[0]["reference"]) > 0
    assert float(rows[0]["eager.seconds"]) > 0
    assert (quick[1] / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_the_table(quick):
    done, _ = quick
    for word in ("% of ceiling", "× reference", "× eager", "peak memory", "relative error", "vs. bound", "GB/s"):
        assert word in done.stdout
    assert "Each row again:" in done.stdout
    assert "no column xformers" not in done.stdout  # xformers has no layer norm


def test_the_command_of_a_row_measures_it_again(quick):
    for row in Results.read(quick[1] / "run.json").rows:
        options = cli.make_parser().parse_args(shlex.split(row.command)[2:])
        cli.check(options, cli.make_parser())
        if row.key.level == "model":
            plan = cli.plan(options, tasks=options.only)
            assert [plan.key(task, row.key.dtype) for task in plan.tasks] == [row.key]
        else:
            assert row.key in cli.keys(row.key.level, options)


def test_a_run_compared_with_itself(quick, capsys):
    results = Results.read(quick[1] / "run.json")
    compare.show(compare.compare(results, results))
    assert capsys.readouterr().out.count("same") == len(NAMES)


@pytest.mark.parametrize("slower", [False, True])
def test_the_gate_decides_the_exit_status(slower, quick, tmp_path, monkeypatch, capsys):
    old = json.loads((quick[1] / "run.json").read_text())
    new = Results.read(quick[1] / "run.json")
    for row in old["rows"]:
        for baseline in row["baselines"].values():
            baseline["ratio"] *= 1.5 if slower else 1.0
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    monkeypatch.setattr(cli, "measure_levels", lambda *_: new)
    monkeypatch.setattr(cli, "again", lambda key, *_: new[key])
    assert cli.main(["--quick", "--compare", str(path), "--fail-if-slower", "10%"]) == slower
    shown = capsys.readouterr()
    assert ("slower" in shown.out) == slower
    assert ("takes +50% of time" in shown.err) == slower


def test_a_wrong_result_fails_the_run(quick, monkeypatch, capsys):
    values = json.loads((quick[1] / "run.json").read_text())
    values["rows"][0] |= {"correct": False, "relative_error": 0.5}
    path = quick[1] / "wrong.json"
    path.write_text(json.dumps(values))
    monkeypatch.setattr(cli, "measure_levels", lambda *_: Results.read(path))
    assert cli.main(["--quick"]) == 1
    shown = capsys.readouterr()
    assert "WRONG" in shown.out
    assert "layer_norm · quick · float32 is wrong" in shown.err


def test_a_row_that_was_not_measured_fails_the_run(quick, monkeypatch, capsys):
    results = Results.read(quick[1] / "run.json")
    results.failed["ops · mlp"] = "it died"
    monkeypatch.setattr(cli, "measure_levels", lambda *_: results)
    assert cli.main(["--quick"]) == 1
    assert "error: ops · mlp: it died" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "float8"], "no such choice 'float8'"),
        (["--level", "ops,sound"], "no such choice 'sound'"),
        (["--steps", "600"], "512"),
        (["--steps", "3", "--reference-steps", "4"], "--reference-steps"),
        (["--frames", "0"], "--frames"),
        (["--threads", "0"], "--threads"),
        (["--mode", "graph"], "--mode graph needs --device cuda"),
        (["--dtype", "int8"], "--dtype int8 is for whole models on a CPU"),
        (["--level", "model", "--dtype", "fp8"], "--dtype fp8 is for whole models on a GPU"),
        (["--waterfall", "--scaling"], "choose one"),
        (["--fail-if-slower", "10%"], "--compare OLD"),
        (["--compare", "old.json", "--fail-if-slower", "ten"], "write 10% or 0.1"),
    ],
)
def test_invalid_options(options, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(options)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--level", "model", "--only", "captioning", "--video", "none.npy"], "none.npy"),
        (["--level", "model", "--video", "none.mp4"], "none.mp4"),
        (["--level", "ops", "--video", "words.npy"], "words.npy: "),
        (
            ["--level", "ops", "--video", "floats.npy"],
            "floats.npy: expected uint8 (frames, height, width, 3), got float32 (2, 3)",
        ),
        (["--scaling", "--video", "none.npy"], "none.npy"),
        (["--waterfall", "--video", "words.mp4"], "words.mp4"),
        (["--level", "ops", "--only", "softmax"], "no such name in ops: softmax"),
        (["--only", "attention,softmax,captioning"], "no such name in ops, modules, model, train, video: softmax"),
        (["--accelerate", "--only", "attention"], "no such name in model: attention"),
        (["--level", "ops", "--only", "beam_step", "--direction", "backward"], "nothing to measure in ops"),
        (["--compare", "none.json"], "none.json"),
        (["--compare", "words.json"], "words.json: not results of this benchmark"),
        (["--json", "none/new.json"], "folder none does not exist"),
        (["--csv", "none/new.csv"], "folder none does not exist"),
        (["--pictures", "none"], "folder none does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_error_line_before_anything_is_measured(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("words.npy", "words.mp4", "words.json"):
        (tmp_path / name).write_text("words")
    np.save(tmp_path / "floats.npy", np.zeros((2, 3), np.float32))
    measured = []
    for module, name in MEASURING:
        monkeypatch.setattr(module, name, lambda *_, name=name: measured.append(name))
    assert cli.main(["--quick", *options]) == 2
    assert measured == []
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert words in error
    assert len(error.splitlines()) == 1


def test_the_reference_before_and_after_acceleration(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "measure_ceilings", lambda *_: CEILINGS)
    target = tmp_path / "results.json"
    options = ["--quick", "--accelerate", "--repeats", "1", "--steps", "3", "--frames", "2", "--json", str(target)]
    assert cli.main(options) == 0
    (row,) = Results.read(target).rows
    assert row.key.name == "captioning, accelerated"
    assert list(row.baselines) == ["reference"]
    assert row.relative_error < row.allowed_error == 1e-5
    assert row.correct
    assert "--accelerate" in row.command
