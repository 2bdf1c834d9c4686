"""docs/data.md: its table is that of the converters, and its sessions print what it shows."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mplug2_fast.cli import app
from mplug2_fast.datasets.converters import CONVERTERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")


def row(converter):
    files = [" or ".join(f"`{name}`" for name in file.names) for file in converter.files]
    named = [text if file.required else f"[{text}]" for file, text in zip(converter.files, files, strict=True)]
    return f"| `{converter.name}` | {converter.title} | {', '.join(converter.fields)} | {', '.join(named)} |"


def test_the_table_has_all_converters():
    assert [line for line in PAGE.splitlines() if re.match(r"\| `[\w-]+` \| .* \| .* \| .* \|$", line)] == [
        row(converter) for converter in CONVERTERS.values()
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that the page shows, and the clips that they name."""
    monkeypatch.chdir(tmp_path)
    for name, content in re.findall(r'^```json title="([^"]+)"\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    Path("clips").mkdir(exist_ok=True)
    for clip in (ROOT / "examples/moving_shapes/clips").glob("*.mp4"):
        Path("clips", clip.name).write_bytes(clip.read_bytes())
    Path("clips/cut.mp4").write_bytes(Path("clips/green_star_shrinks.mp4").read_bytes()[:3000])


def test_commands_print_what_the_page_shows(folder):
    sessions = re.findall(r"^\$ mplug2-fast (data .*)\n((?:(?!\$ |```).*\n)*)", PAGE, re.MULTILINE)
    assert len(sessions) == 5
    for command, expected in sessions:
        assert CliRunner().invoke(app, shlex.split(command)).output.strip() == expected.strip(), command


def test_the_lines_of_the_page_are_json():
    (lines,) = re.findall(r"^```jsonl\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    from mplug2_fast.datasets import Item

    for line in lines.splitlines():
        assert Item.from_json(json.loads(line)).to_json() == json.loads(line)
