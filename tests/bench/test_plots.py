from dataclasses import replace
from pathlib import Path

import pytest

from bench.row import Results, on_roofline
from tests.bench.test_targets import CEILINGS, op

plots = pytest.importorskip("bench.plots")
pytest.importorskip("matplotlib")

MACHINE = {
    "cpu": "A CPU",
    "cores": 2,
    "threads": 2,
    "gpu": None,
    "simd": ["avx2"],
    "memory_bytes": 10**9,
    "os": "Linux",
}
VERSIONS = {"torch": "2.13.0", "python": "CPython 3.11", "mplug2_fast": "0.1.0", "commit": "0123456789ab"}
SECONDS = (100.0, 20.0, 5.0)
WATERFALL = {
    "machine": MACHINE,
    "versions": VERSIONS,
    "command": "python bench/run.py --waterfall",
    "sizes": "tiny, 2 frames",
    "notes": ["Input: a clip."],
    "rows": [
        {
            "technique": f"technique {index}",
            "seconds": seconds,
            "runs": 3,
            "x_released": SECONDS[0] / seconds,
            "x_previous": SECONDS[index - 1] / seconds if index else None,
            "peak_memory_bytes": None if index else 5_000_000_000,
            "same_caption": index != 1,
            "relative_error": (0.0, 0.3, 1e-7)[index],
            "dtype": "float32",
        }
        for index, seconds in enumerate(SECONDS)
    ],
}
SCALING = {
    "command": "python bench/run.py --scaling",
    "machine": MACHINE,
    "versions": VERSIONS,
    "rows": [
        {
            "axis": axis,
            "value": value,
            "default": value == 2,
            "name": "tiny, 2 frames",
            "dtype": "float32",
            "expected_seconds": 1.0 * value,
            "seconds": None if value == 4 else 1.1 * value,
            "fastest": 1.0 * value,
            "slowest": 1.2 * value,
            "runs": 3,
            "peak_memory_bytes": None if value == 4 else 10**9,
            "problem": "too large" if value == 4 else None,
        }
        for axis in ("frames", "batch", "resolution", "beams")
        for value in (1, 2, 4)
    ],
}


def results(*rows):
    return Results(MACHINE, VERSIONS, CEILINGS, list(rows))


ROWS = results(
    op("mlp", bytes=10**9),
    op("mlp", "float32", bytes=2 * 10**9),
    op("layer_norm", flop=10**6, bytes=10**6, seconds=1e-4),
    op("linear_act", sizes="large, step", flop=10**7, bytes=10**7, seconds=1e-3),
    op("attention"),  # has no bytes
)


def drawn(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.mark.parametrize(
    ("name", "given"),
    [("roofline", ROWS), ("waterfall", WATERFALL), ("scaling", SCALING)],
    ids=lambda value: str(value)[:9],
)
def test_the_same_figures_give_the_same_bytes(name, given, tmp_path):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    for path in (first, second):
        getattr(plots, name)(given, path)
    assert min(drawn(first)) > 500
    assert first.read_bytes() == second.read_bytes()


def test_names_omit_common_sizes():
    rows = [op("linear_act", sizes="large, step"), op("linear_act", sizes="large"), op("mlp", sizes="large")]
    assert plots.short_names(rows) == ["linear act, step", "linear act", "mlp"]


def test_labels_do_not_overlap(monkeypatch, tmp_path):
    places = []

    def spy(axes, works):
        plots_label(axes, works)
        renderer = axes.figure.canvas.get_renderer()
        places.extend(plots.extent(text, renderer) for text in axes.texts)

    plots_label = plots.label
    monkeypatch.setattr(plots, "label", spy)
    near = [op("mlp", sizes=f"large, {n}", flop=10**6 + n, bytes=10**6, seconds=1e-4) for n in range(6)]
    plots.roofline(results(*near), tmp_path / "roofline.png")
    assert len(places) == 6 + 2
    assert not any(plots.area(a, b) for i, a in enumerate(places) for b in places[:i])


def test_rooflines_omit_gradients_and_edge_cases():
    row = op("mlp", bytes=10**9)
    others = [{"direction": "both"}, {"sizes": "edge, rows 7"}]
    assert on_roofline([row, *(replace(row, key=replace(row.key, **other)) for other in others)]) == [row]
    with pytest.raises(ValueError, match="no row has both FLOP and bytes"):
        plots.roofline(results(op("attention")), Path("not written.png"))
