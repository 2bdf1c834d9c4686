"""Type checkers accept a user of the public interface, and find its mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[2]
MISTAKES = """
import mplug2_fast as mf

size: str = mf.MPlug2Config.preset("tiny").text.hidden_size
video = mf.load_video(3)
mf.ops.layer_norm(video, epsilon=1e-5)
mf.no_such_name
"""


@pytest.fixture(scope="session")
def cache(request, tmp_path_factory):
    """A folder that is kept between runs, because the first look at torch takes half a minute."""
    kept = getattr(request.config, "cache", None)
    return kept.mkdir("mypy") if kept else tmp_path_factory.mktemp("mypy")


def mypy(cache, *files):
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(cache)]
    done = subprocess.run([*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines() + done.stderr.splitlines()


def test_client_and_its_mistakes(cache, tmp_path):
    wrong = tmp_path / "mistakes.py"
    wrong.write_text(MISTAKES)
    found = mypy(cache, "tests/typing/client.py", wrong)
    assert [line for line in found if "client.py" in line] == []
    errors = [line for line in found if "mistakes.py" in line and "error:" in line]
    assert [line.split(":")[1] for line in errors] == ["4", "5", "6", "7"], found
    assert "incompatible type" in errors[1]
    assert "Found 4 errors in 1 file" in found[-1]
