"""The README is short, and its figures are those of the committed results."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tiny_models_figures_are_the_measured_ones():
    results = json.loads((ROOT / "examples/moving_shapes/results.json").read_text())
    tiny, ablation = results["tiny"], results["no_local_temporal"]
    for label, key in (("captions", "captions"), ("answers", "answers"), ("left or right", "direction")):
        row = next(line for line in README.splitlines() if line.startswith(f"| {label}"))
        figures = [f"{round(100 * model[key], 1):g}%" for model in (tiny, ablation)]
        assert [figure in row for figure in figures] == [True, True], (row, figures)


def test_it_is_short():
    assert len([word for word in README.split() if any(map(str.isalnum, word))]) < 1400
