import json
import re
from dataclasses import replace

import pytest

from bench import committed, performance, report
from bench.row import Baseline
from tests.bench.test_plots import MACHINE, SCALING, VERSIONS, WATERFALL, results
from tests.bench.test_targets import CAPTIONING, op

README = (
    "before\n<!-- bench:headline -->\nold\n<!-- /bench -->\nbetween\n<!-- bench:a-cpu/ops-large -->\n<!-- /bench -->\n"
)


def write(root, machine, name, what):
    path = root / "bench/results" / machine / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    what.write(path) if hasattr(what, "write") else path.write_text(json.dumps(what))


@pytest.fixture
def root(tmp_path):
    """A checkout with results of two machines and another file."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    baselines = {
        "reference": Baseline(155.5, 15.55, 5_430_000_000, 0.0),
        "compiled": Baseline(13.1, 1.31, 3_340_000_000, 0.01),
    }
    write(tmp_path, "a-cpu", "model-large", results(replace(CAPTIONING, baselines=baselines)))
    mlp = [op("mlp", bytes=10**9, ratios={"two GEMMs": 0.9}), op("mlp", "float32", ratios={"two GEMMs": 0.97})]
    write(tmp_path, "a-cpu", "ops-large", results(*mlp))
    write(tmp_path, "b-cpu", "waterfall-large", WATERFALL)
    write(tmp_path, "b-cpu", "scaling-tiny-float32", SCALING)
    write(tmp_path, "gpu", "summary", {"steps": []})
    return tmp_path


def page(root):
    return performance.page(committed.machines(root / "bench/results"), root / "docs")


def test_the_contents_of_a_file_decide_its_kind(root):
    found = {
        machine.name: [file.kind for file in machine.files] for machine in committed.machines(root / "bench/results")
    }
    assert found == {"a-cpu": ["rows", "rows"], "b-cpu": ["scaling", "waterfall"]}


def test_the_headline_is_captioning_end_to_end(root, monkeypatch):
    monkeypatch.setattr(report.plots, "available", lambda: False)  # drawing is slow
    report.main(["--root", str(root)])
    text = (root / "README.md").read_text()
    assert text.startswith("before\n<!-- bench:headline -->\n| machine |")
    assert "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| a-cpu |"))
    assert row == ("| a-cpu | bfloat16 | 156 s | 13.1 s | 10 s | 15.6× | 1.31× | 77% | 2.99 GB | 5.43 GB | 3.34 GB |")
    assert "- a-cpu: A CPU, 2 threads · torch 2.13.0, at 0123456789ab." in text
    assert "| mlp |" in text.split("between")[1]


def test_targets_are_met_missed_or_not_measured(root):
    text = page(root)
    assert "| MLP with activation | bfloat16 | ≥ 95% of the two GEMMs alone | 90%, missed |" in text
    assert "| MLP with activation | float32 | ≥ 95% of the two GEMMs alone | 97%, met |" in text
    missed, left = text.split("### Missed")[1].split("### Not measured")
    left = left.split("\n## ")[0]
    assert "- a-cpu: captioning end to end, bfloat16: 15.55×, wanted ≥ 30× reference" in missed
    assert "float32" not in missed
    assert "    - layer norm: ≥ 80% of copy bandwidth (float32, bfloat16)" in left
    assert "- NVIDIA H200: none of the targets" in left
    assert "- a-cpu: 3 met, 3 missed, 0 stated, " in text


def test_each_file_has_its_section_commands_and_picture(root):
    text = page(root)
    for heading in ("a-cpu: model-large", "a-cpu: ops-large", "b-cpu: waterfall-large", "b-cpu: scaling-tiny-float32"):
        assert f"\n### {heading}\n" in text
        assert f"](#{performance._anchor(heading)})" in text
    assert "python bench/run.py --waterfall" in text
    assert "](../bench/results/b-cpu/waterfall-large.png)" in text
    assert "](../bench/results/a-cpu/ops-large-roofline.png)" in text
    assert "model-large-roofline" not in text  # it has no bytes
    assert "| + technique 1 | float32 | 20 s | 5.00× | 5.00× | – | no | 3e-01 WRONG |" in text
    assert "\n\nInput: a clip.\n\n" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_check_finds_outdated_pages_and_changes_nothing(root, capsys):
    assert report.main(["--root", str(root), "--check"]) == 1
    assert "run python bench/report.py" in capsys.readouterr().err
    assert (root / "README.md").read_text() == README
    assert not (root / "docs/performance.md").exists()
    pytest.importorskip("matplotlib")
    report.main(["--root", str(root)])
    assert report.main(["--root", str(root), "--check"]) == 0
    (root / "bench/results/b-cpu/waterfall-large.png").unlink()
    assert report.main(["--root", str(root), "--check"]) == 1
    assert "waterfall-large.png" in capsys.readouterr().err


def test_pages_are_written_without_matplotlib(root, monkeypatch, capsys):
    monkeypatch.setattr(report.plots, "available", lambda: False)
    assert report.main(["--root", str(root)]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert (root / "docs/performance.md").exists()
    assert not list(root.rglob("*.png"))


def test_the_documentation_is_up_to_date():
    assert report.main(["--check"]) == 0


def test_results_contain_no_paths():
    for path in committed.RESULTS.rglob("*.json"):
        assert not re.search(r"/(tmp|home|root|work)/", path.read_text()), path.name


def test_results_describe_their_machine():
    for machine in committed.machines():
        for file in machine.files:
            assert set(MACHINE) - {"threads"} <= set(file.machine), file.path
            assert set(VERSIONS) <= set(file.versions), file.path
