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


SETTINGS = """
[mypy]
strict = true
follow_imports = silent
[mypy-{untyped}.*]
follow_imports = skip
"""


@pytest.mark.parametrize("untyped", ["torch", pytest.param("none", marks=pytest.mark.soak)])
def test_client_and_its_mistakes(untyped, tmp_path):
    """Without torch's types, which take mypy half a minute, and with them."""
    wrong, settings = tmp_path / "mistakes.py", tmp_path / "mypy.ini"
    wrong.write_text(MISTAKES)
    settings.write_text(SETTINGS.format(untyped=untyped))
    command = [sys.executable, "-m", "mypy", "--config-file", settings, "--cache-dir", tmp_path / "cache"]
    done = subprocess.run([*command, "tests/typing/client.py", wrong], cwd=ROOT, capture_output=True, text=True)
    found = done.stdout.splitlines() + done.stderr.splitlines()
    assert [line for line in found if "client.py" in line] == []
    errors = [line for line in found if "mistakes.py" in line and "error:" in line]
    assert [line.split(":")[1] for line in errors] == ["4", "5", "6", "7"], found
    assert "incompatible type" in errors[1]
    assert "Found 4 errors in 1 file" in found[-1]
