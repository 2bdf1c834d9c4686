import json
import re
from pathlib import Path

import pytest

from bench import render

README = Path(__file__).parents[2] / "README.md"

ROW = {
    "level": "decode",
    "name": "large, 16 frames, 5 beams, 15 steps",
    "implementation": "fast",
    "dtype": "bfloat16",
    "device": "cpu",
    "seconds": 1.2345,
    "gflops": 202.4,
    "percent_of_ceiling": 33.3,
    "x_reference": 123.4,
    "x_compiled": 1.5,
    "peak_memory_bytes": 2_340_000_000,
    "relative_error": 0.0031,
    "backend": "oneDNN",
    "command": "python bench/run.py",
}
RESULTS = {
    "machine": {"cpu": "A CPU", "threads": 2, "gpu": None},
    "versions": {"torch": "2.13.0"},
    "ceilings": {"gemm": {"bfloat16": {"gflops": 608.0, "operator": "F.linear"}}, "copy_gb_per_second": 66.0},
    "rows": [{**ROW, "implementation": "reference", "x_compiled": None}, ROW],
}
TEXT = "before\n<!-- bench:large -->\nold\n<!-- /bench -->\nafter\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "large.json").write_text(json.dumps(RESULTS))
    readme = tmp_path / "README.md"
    readme.write_text(TEXT)
    return readme, ["--readme", str(readme), "--results", str(tmp_path)]


def test_writes_the_table_and_nothing_else(files):
    readme, options = files
    assert render.main(options) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:large -->\n| level |")
    assert text.endswith("<!-- /bench -->\nafter\n")
    fast = next(line for line in text.splitlines() if "| fast |" in line)
    assert fast == "| decode | fast | bfloat16 | 1.23 | 202 | 33 | 123× | 1.50× | 2.34 GB | 3e-03 | oneDNN |"
    assert "| – |" in next(line for line in text.splitlines() if "| reference |" in line)
    assert "large, 16 frames, 5 beams, 15 steps · A CPU, 2 threads · torch 2.13.0" in text
    assert "bfloat16 608 GFLOP/s (F.linear); copy 66 GB/s" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_check_tells_old_from_new_and_changes_nothing(files, capsys):
    readme, options = files
    assert render.main([*options, "--check"]) == 1
    assert "run python bench/render.py" in capsys.readouterr().err
    assert readme.read_text() == TEXT
    render.main(options)
    assert render.main([*options, "--check"]) == 0


def test_a_block_without_results_says_so(tmp_path):
    assert "Not measured yet." in render.render(TEXT, tmp_path)
    assert "old" not in render.render(TEXT, tmp_path)


def test_the_readme_says_what_was_measured():
    if not README.exists() or not re.search(r"<!-- bench:[\w-]+ -->", README.read_text()):
        pytest.skip("the README has no measured table yet")
    assert render.main(["--check"]) == 0


def test_measured_results_name_no_place():
    for path in render.RESULTS.glob("*.json"):
        assert not re.search(r"/(tmp|home|root|work)/", path.read_text()), path.name


def test_the_page_of_operators_is_what_they_say():
    assert render.OPERATORS.read_text() == render.operators_page()
