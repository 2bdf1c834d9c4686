"""Charts of cost against sizes: a quick run, and what happens to points that cannot be run."""

import csv
import json
from contextlib import contextmanager

import pytest

from bench import cli, flops, plots, scaling
from bench.measure import Measured
from bench.workers import WorkerError
from mplug2_fast import MPlug2Config

PNG = b"\x89PNG\r\n\x1a\n"


class Silent:
    def begin(self, what):
        pass

    def finished(self, what, seconds):
        pass


def sweep(*options):
    return cli.parse(["--scaling", *options])[0]


def measured(seconds):
    found = Measured("native")
    for value in seconds:
        found.add({"seconds": value, "peak_memory_bytes": int(1e9 * value), "relative_error": None})
    return found


def test_a_quick_run(tmp_path, capfd):
    options = ["--scaling", "--quick", "--repeats", "1", "--steps", "2", "--threads", "1"]
    assert cli.main([*options, "--output", str(tmp_path / "new")]) == 0
    stem = tmp_path / "new" / "scaling-tiny-float32"
    written = [stem.with_suffix(kind) for kind in (".json", ".csv", ".png")]
    assert capfd.readouterr().out.split() == [str(path) for path in written]
    assert written[2].read_bytes().startswith(PNG)

    results = json.loads(written[0].read_text())
    assert results["machine"]["threads"] == 1
    assert results["command"].startswith("python bench/run.py --scaling --preset tiny --dtype float32 ")
    rows = results["rows"]
    assert [(row["axis"], row["value"]) for row in rows] == [
        *(("frames", 4), ("frames", 8), ("batch", 1), ("batch", 2)),
        *(("resolution", 32), ("resolution", 48), ("beams", 1), ("beams", 5)),
    ]
    assert [row["value"] for row in rows if row["default"]] == [4, 1, 32, 5]
    for row in rows:
        assert row["problem"] is None
        assert row["runs"] == 1
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 50e6
        if row["default"]:
            assert row["expected_seconds"] == pytest.approx(row["seconds"])
    larger = MPlug2Config.preset("tiny").replace(image_size=48)
    needed = flops.needed("captioning", larger, frames=4, beams=5, steps=2)
    assert rows[5]["needed_gflop"] == pytest.approx(needed / 1e9)

    with written[1].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == [row["name"] for row in rows]
    assert [float(row["seconds"]) for row in table] == [row["seconds"] for row in rows]


def test_points_of_large():
    plan = sweep("--preset", "large")
    assert plan.repeats == 3
    assert plan.axes() == {
        "frames": [4, 8, 16, 32, 64],
        "batch": [1, 2, 4, 8],
        "resolution": [224, 336],
        "beams": [1, 2, 5, 10],
    }
    points = plan.points()
    assert points[0] == scaling.Point(frames=16, batch=1, resolution=224, beams=5)
    assert len(points) == len(set(points)) == 1 + 4 + 3 + 1 + 3


def test_a_default_point_between_the_others_is_among_them():
    plan = sweep("--quick", "--frames", "6", "--beams", "3")
    assert plan.axes()["frames"] == [4, 6, 8]
    assert plan.axes()["beams"] == [1, 3, 5]


def test_a_point_that_cannot_be_run_is_a_row(tmp_path, monkeypatch):
    def measure_point(plan, dtype, point, exchange, progress):
        plan.config_at(point)
        if point.batch > 1:
            raise WorkerError("fast float32: the process was killed, most likely for want of memory\nits log")
        return measured([0.5, 0.4, 0.9])

    monkeypatch.setattr(scaling, "measure_point", measure_point)
    # One and a half times 32 pixels is no whole number of such patches.
    odd = MPlug2Config.preset("tiny").replace(patch_size=32)
    monkeypatch.setattr(scaling.Sweep, "config", odd)
    written = scaling.run(sweep("--quick"), tmp_path, Silent())
    rows = {(row["axis"], row["value"]): row for row in json.loads(written[0].read_text())["rows"]}
    assert rows["frames", 8]["seconds"] == 0.5
    assert (rows["frames", 8]["fastest"], rows["frames", 8]["slowest"]) == (0.4, 0.9)
    killed = rows["batch", 2]
    assert killed["problem"] == "fast float32: the process was killed, most likely for want of memory"
    assert killed["seconds"] is None
    assert killed["expected_seconds"] == pytest.approx(2 * 0.5)
    impossible = rows["resolution", 48]
    assert "multiple of the patch size" in impossible["problem"]
    assert impossible["expected_seconds"] is None
    assert written[2].read_bytes().startswith(PNG)


def test_without_a_default_point_there_is_nothing_to_compare_with(tmp_path, monkeypatch, capsys):
    def measure_point(*_):
        raise WorkerError("fast float32: RuntimeError: out of memory")

    monkeypatch.setattr(scaling, "measure_point", measure_point)
    assert cli.main(["--scaling", "--quick", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == "error: fast float32: RuntimeError: out of memory"
    assert not list(tmp_path.iterdir())


def test_unknown_memory_can_be_drawn(tmp_path):
    plan = sweep("--quick")
    found = Measured("native", [1.0])
    rows = scaling.tabulate(plan, "float32", dict.fromkeys(plan.points(), found))
    described = {"cpu": "CPU", "gpu": None, "threads": 1}
    plots.scaling(
        {"rows": [vars(row) for row in rows], "machine": described, "versions": {"torch": "2"}}, tmp_path / "a.png"
    )
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_slow_points_run_once(tmp_path, monkeypatch):
    class Client:
        @staticmethod
        @contextmanager
        def start(spec):
            yield Client()

        def call(self, method, *_):
            return {"backend": "native", "seconds": 30.0, "peak_memory_bytes": 1, "relative_error": None}

    monkeypatch.setattr(scaling, "Client", Client)
    plan = sweep("--quick")
    assert scaling.measure_point(plan, "float32", plan.default, str(tmp_path), Silent()).seconds == [30.0]


@pytest.mark.parametrize("option", [["--json", "results.json"], ["--level", "vision"]])
def test_options_of_the_table_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(["--scaling", *option])
    assert stopped.value.code == 2
    assert "--output" in capsys.readouterr().err


def test_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(plots, "available", lambda: False)
    with pytest.raises(SystemExit):
        cli.parse(["--scaling"])
    assert "pip install matplotlib" in capsys.readouterr().err
