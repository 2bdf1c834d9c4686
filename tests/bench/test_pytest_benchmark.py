"""`pytest bench`: the operators under pytest-benchmark."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("pytest_benchmark")


def test_an_operator_runs_every_way(native_module):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "bench"]
    options = ["--sizes", "quick", "-k", "add_layer_norm and float32", "--benchmark-disable"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 passed" in done.stdout  # three directions, three ways


def test_only_operators_are_collected_and_only_where_asked_for(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
    patterns = pytestconfig.getini("python_files")
    found = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in (ROOT / "bench").rglob(pattern)}
    assert found == {"bench/test_ops.py"}
