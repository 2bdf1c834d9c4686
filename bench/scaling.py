"""How time and peak memory of captioning with the fast model grow when one size varies from a default point.

Each point has its own process, and so its own peak memory.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import flops, inputs, machine, plots
from bench.measure import Measured
from bench.plan import Plan, Spec
from bench.process import Process, ProcessError
from bench.progress import Progress
from bench.worker import Worker
from mplug2_fast import MPlug2Config
from mplug2_fast.errors import MPlug2Error

FULL = {"frames": (4, 8, 16, 32, 64), "batch": (1, 2, 4, 8), "resolution": (1, 1.5), "beams": (1, 2, 5, 10)}
QUICK = {"frames": (4, 8), "batch": (1, 2), "resolution": (1, 1.5), "beams": (1, 5)}
"""The values of each size. Those of the resolution are multiples of the preset's."""
SLOW_SECONDS = 20.0
"""A point with a slower run is not repeated."""


@dataclass(frozen=True)
class Point:
    """The sizes that vary. The resolution is in pixels per side."""

    frames: int
    batch: int
    resolution: int
    beams: int


@dataclass(frozen=True)
class Sweep(Plan):
    """A plan whose sizes are the default point. One axis at a time varies from it."""

    @property
    def default(self) -> Point:
        return Point(self.frames, self.batch, self.config.vision.image_size, self.beams)

    def axes(self) -> dict[str, list[int]]:
        """The values of each axis in order, with the default point's."""
        values = dict(QUICK if self.quick else FULL)
        values["resolution"] = tuple(int(self.default.resolution * factor) for factor in values["resolution"])
        return {axis: sorted({*values[axis], getattr(self.default, axis)}) for axis in values}

    def points(self) -> list[Point]:
        """Each point once, the default first, because all others are compared with it."""
        varied = [replace(self.default, **{axis: value}) for axis, values in self.axes().items() for value in values]
        return list(dict.fromkeys([self.default, *varied]))

    def config_at(self, point: Point) -> MPlug2Config:
        """Raises `ConfigError` if patches do not fill the resolution."""
        return self.config.replace(image_size=point.resolution)

    def needed_flop_at(self, point: Point) -> int | None:
        """None if there is no such model."""
        try:
            config = self.config_at(point)
        except MPlug2Error:
            return None
        sizes = {"frames": point.frames, "beams": point.beams, "steps": self.steps, "batch": point.batch}
        return flops.needed("captioning", config, **sizes)

    def again(self, dtype: str) -> str:
        """The command that repeats the sweep."""
        words = ["--scaling", "--preset", self.preset, "--dtype", dtype, *self.size_options()]
        return self.command_of(words + (["--quick"] if self.quick else []))


@dataclass(frozen=True)
class Row:
    """One value of one axis. The default point has a row on each axis.

    Attributes:
        seconds: median of `runs` runs, between `fastest` and `slowest`. None if there is a `problem`.
        expected_seconds: from the needed FLOP, scaled so that the default point takes its measured time.
        peak_memory_bytes: of the whole process on the CPU, with weights and libraries; of the allocator on CUDA.
        problem: why the point could not be run.
    """

    axis: str
    value: int
    default: bool
    level: str
    name: str
    dtype: str
    device: str
    needed_gflop: float | None
    expected_seconds: float | None
    seconds: float | None
    fastest: float | None
    slowest: float | None
    runs: int
    peak_memory_bytes: int | None
    problem: str | None


def run(sweep: Sweep, folder: Path, progress: Progress) -> list[Path]:
    """Measures each dtype. Returns the files that it wrote: JSON, CSV and PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for dtype in sweep.dtypes:
        described, versions = machine.describe()
        described["threads"] = sweep.threads
        rows = [asdict(row) for row in tabulate(sweep, dtype, measure(sweep, dtype, progress))]
        results = {"command": sweep.again(dtype), "machine": described, "versions": versions, "rows": rows}
        written += write(results, folder / f"scaling-{sweep.preset}-{dtype}")
    return written


def measure(sweep: Sweep, dtype: str, progress: Progress) -> dict[Point, Measured | str]:
    """The runs of each point, or the error of a point that failed. Raises if the default point cannot run."""
    results: dict[Point, Measured | str] = {}
    with tempfile.TemporaryDirectory() as exchange:
        for point in sweep.points():
            try:
                results[point] = measure_point(sweep, dtype, point, exchange, progress)
            except (MPlug2Error, ProcessError) as error:
                if point == sweep.default:
                    raise
                results[point] = str(error).splitlines()[0]
    return results


def measure_point(sweep: Sweep, dtype: str, point: Point, exchange: str, progress: Progress) -> Measured:
    """Timed runs in a new process. The warm-up takes the smallest video, so that it does not set the peak memory."""
    config = sweep.config_at(point)
    spec = Spec("fast", dtype, sweep.device, sweep.threads, config, point.beams, sweep.steps, exchange)
    what = f"{name(sweep, point)} · {spec.label}"
    progress.begin(f"{what} · starting")
    with Process(spec.label, Worker, spec) as worker:
        measured = Measured(worker.ready().call(Worker.describe)[0])
        save_video(sweep, replace(point, frames=sweep.axes()["frames"][0], batch=1), exchange)
        worker.call(Worker.run, "captioning")
        save_video(sweep, point, exchange)
        for repeat in range(sweep.repeats):
            now = f"{what} · run {repeat + 1} of {sweep.repeats}"
            progress.begin(now)
            measured.add(worker.call(Worker.run, "captioning"))
            progress.finished(now, measured.seconds[-1])
            if measured.seconds[-1] > SLOW_SECONDS:
                break
    return measured


def save_video(sweep: Sweep, point: Point, exchange: str) -> None:
    video, _ = inputs.load(sweep.video, point.frames, point.resolution)
    torch.save(video.expand(point.batch, *video.shape).contiguous(), Path(exchange) / "video.pt")


def name(sweep: Sweep, point: Point) -> str:
    """The sizes of a point."""
    sizes = replace(sweep, frames=point.frames, batch=point.batch, beams=point.beams)
    return f"{sizes.sizes}, {point.resolution} px"


def tabulate(sweep: Sweep, dtype: str, results: Mapping[Point, Measured | str]) -> list[Row]:
    """The rows of one dtype, by axis and value."""
    default = results[sweep.default]
    assert isinstance(default, Measured)
    per_flop = default.median / sweep.needed_flop_at(sweep.default)
    rows = []
    for axis, values in sweep.axes().items():
        for value in values:
            point = replace(sweep.default, **{axis: value})
            found, needed = results[point], sweep.needed_flop_at(point)
            ran = found if isinstance(found, Measured) else None
            rows.append(
                Row(
                    axis=axis,
                    value=value,
                    default=point == sweep.default,
                    level="captioning",
                    name=name(sweep, point),
                    dtype=dtype,
                    device=sweep.device,
                    needed_gflop=None if needed is None else needed / 1e9,
                    expected_seconds=None if needed is None else needed * per_flop,
                    seconds=ran and ran.median,
                    fastest=ran and min(ran.seconds),
                    slowest=ran and max(ran.seconds),
                    runs=len(ran.seconds) if ran else 0,
                    peak_memory_bytes=ran and ran.peak_memory_bytes,
                    problem=None if ran else found,
                )
            )
    return rows


def write(results: dict[str, Any], stem: Path) -> list[Path]:
    """Writes `stem`.json, `stem`.csv and `stem`.png."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("json", "csv", "png")]
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(results["rows"][0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(results["rows"])
    plots.scaling(results, paths[2])
    return paths
