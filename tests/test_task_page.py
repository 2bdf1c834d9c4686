"""docs/tasks.md: its files and commands, run one after another, give what the page shows."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mplug2_fast as mf
from mplug2_fast.cli import app

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page's files beside a clip, after its commands have run."""
    folder = tmp_path_factory.mktemp("page")
    for name, code in re.findall(r'^```py title="(\S+)"\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE):
        (folder / name).write_text(code)
    shutil.copy(ROOT / "examples/moving_shapes/clips/red_square_moves_left.mp4", folder / "clip.mp4")
    return folder


def test_the_page(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    torch.manual_seed(0)
    exec(compile((folder / "train.py").read_text(), "train.py", "exec"), {"__name__": "__main__"})
    shown = re.search(
        r"^```\n(.*?)^```$", PAGE.split('title="train.py"')[1].split("```", 1)[1], re.DOTALL | re.MULTILINE
    )
    assert capsys.readouterr().out == shown[1]
    (session,) = re.findall(r"^```console title=\"shell\"\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for step in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
        command, expected = step.split("\n", 1)
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert (done.stdout.strip(), done.exit_code) == (expected.strip(), 0), done.stderr

    entailment = sys.modules["entailment"].Entailment()
    found = mf.checkpoint.inspect("entailment", [mf.tasks.TASKS["captioning"], entailment])
    assert found.ok
    assert found.tasks == ("captioning", "entailment")
    unknown = CliRunner().invoke(app, ["inspect", "entailment"])
    assert unknown.exit_code == 2
    assert "its task entailment does not come with this package" in unknown.stderr
    own = ["--task", "entailment.py:Entailment", "--checkpoint", "entailment", "--text", "it moves"]
    bulk = CliRunner().invoke(app, ["predict", "clip.mp4", *own, "--out", "results.jsonl", "--option", "num_return=3"])
    assert bulk.exit_code == 0, bulk.stderr
    assert '"question": "it moves"' in Path("results.jsonl").read_text()
    sys.modules.pop("entailment")
