"""Charts of cost against sizes: a quick run, and points that cannot run."""

import csv
import json

import pytest

from bench import flops, scaling
from bench.measure import Measured
from bench.process import ProcessError
from bench.progress import Progress
from mplug2_fast import MPlug2Config

PNG = b"\x89PNG\r\n\x1a\n"


QUICK = {"preset": "tiny", "frames": 4, "quick": True}


def sweep(preset="large", frames=16, repeats=3, **changes):
    sizes = {"beams": 5, "steps": 15, "batch": 1, "reference_steps": 15, **changes}
    return scaling.Sweep(
        preset, ("float32",), "cpu", ("captioning",), frames=frames, repeats=repeats, threads=1, **sizes
    )


def reply(seconds):
    memory = int(1e9 * seconds)
    return {
        "seconds": seconds,
        "peak_memory_bytes": memory,
        "added_memory_bytes": memory // 2,
        "relative_error": None,
    }


def measured(seconds):
    found = Measured("native")
    for value in seconds:
        found.add(reply(value))
    return found


def test_a_quick_run(forked, tmp_path):
    written = scaling.run(sweep(**QUICK, repeats=1, steps=2), tmp_path / "new", Progress())
    stem = tmp_path / "new" / "scaling-tiny-float32"
    assert written == [stem.with_suffix(kind) for kind in (".json", ".csv", ".png")]
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
    plan = sweep()
    assert plan.axes() == {
        "frames": [4, 8, 16, 32, 64],
        "batch": [1, 2, 4, 8],
        "resolution": [224, 336],
        "beams": [1, 2, 5, 10],
    }
    points = plan.points()
    assert points[0] == scaling.Point(frames=16, batch=1, resolution=224, beams=5)
    assert len(points) == len(set(points)) == 1 + 4 + 3 + 1 + 3


def test_the_default_point_is_among_the_values():
    plan = sweep("tiny", 6, quick=True, beams=3)
    assert plan.axes()["frames"] == [4, 6, 8]
    assert plan.axes()["beams"] == [1, 3, 5]


def test_a_point_that_fails_is_a_row(tmp_path, monkeypatch):
    def measure_point(plan, dtype, point, exchange, progress):
        plan.config_at(point)
        if point.batch > 1:
            raise ProcessError("fast float32: the process was killed, probably because memory ran out\nits log")
        return measured([0.5, 0.4, 0.9])

    monkeypatch.setattr(scaling, "measure_point", measure_point)
    # One and a half times 32 pixels is no whole number of such patches.
    odd = MPlug2Config.preset("tiny").replace(patch_size=32)
    monkeypatch.setattr(scaling.Sweep, "config", odd)
    written = scaling.run(sweep(**QUICK), tmp_path, Progress())
    rows = {(row["axis"], row["value"]): row for row in json.loads(written[0].read_text())["rows"]}
    assert rows["frames", 8]["seconds"] == 0.5
    assert (rows["frames", 8]["fastest"], rows["frames", 8]["slowest"]) == (0.4, 0.9)
    killed = rows["batch", 2]
    assert killed["problem"] == "fast float32: the process was killed, probably because memory ran out"
    assert killed["seconds"] is None
    assert killed["expected_seconds"] == pytest.approx(2 * 0.5)
    impossible = rows["resolution", 48]
    assert "multiple of the patch size" in impossible["problem"]
    assert impossible["expected_seconds"] is None
    assert written[2].read_bytes().startswith(PNG)


def test_a_default_point_that_fails_ends_the_run(tmp_path, monkeypatch):
    def measure_point(*_):
        raise ProcessError("fast float32: RuntimeError: out of memory")

    monkeypatch.setattr(scaling, "measure_point", measure_point)
    with pytest.raises(ProcessError, match="fast float32: RuntimeError: out of memory"):
        scaling.run(sweep(**QUICK), tmp_path, Progress())
    assert not list(tmp_path.iterdir())


def test_slow_points_run_once(tmp_path, monkeypatch):
    class Slow:
        def __init__(self, label, make, spec):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ready(self):
            return self

        def call(self, function, *_):
            return ("native", []) if function is scaling.Worker.describe else reply(30.0)

    monkeypatch.setattr(scaling, "Process", Slow)
    plan = sweep(**QUICK)
    assert scaling.measure_point(plan, "float32", plan.default, str(tmp_path), Progress()).seconds == [30.0]
