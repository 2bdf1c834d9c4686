"""`mplug2-fast evaluate` and `compare`, as docs/evaluation.md shows them."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mplug2_fast.cli import app
from mplug2_fast.evaluation import ItemResult, Report, compare

ROOT = Path(__file__).parents[2]
CLIPS = ROOT / "examples/moving_shapes/clips"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(CLIPS, folder / "clips")
    return folder


def masked(text: str) -> list[str]:
    """Lines without their numbers. Of items only the order may differ, and what the model says of them."""
    lines = [re.sub(r"[-+]?[\d,.]*\d", "#", " ".join(line.split())) for line in text.splitlines() if line]
    end = next((place for place, line in enumerate(lines) if line.startswith("item ")), len(lines))
    return lines[: end + 1] + sorted(line.split()[0] for line in lines[end + 1 :])


def test_the_commands_of_the_page(folder, monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="the metrics of captions need the extra evaluate")
    monkeypatch.chdir(folder)
    page = (ROOT / "docs/evaluation.md").read_text()
    sessions = re.findall(r"^\$ mplug2-fast (.*)\n((?:(?!\$ |```).*\n)*)", page, re.MULTILINE)
    assert [command.split()[0] for command, _ in sessions] == ["evaluate", "evaluate", "compare"]
    for command, expected in sessions:
        done = CliRunner().invoke(app, shlex.split(command))
        assert done.exit_code == 0, done.output
        written = [line for line in done.stderr.splitlines() if ": report.html" in line]
        shown = [line for line in expected.splitlines() if ": report.html" in line]
        assert (masked("\n".join(written)), masked(done.stdout)) == (
            masked("\n".join(shown)),
            masked("\n".join(line for line in expected.splitlines() if line not in shown)),
        ), command
    settings = json.loads((folder / "one/report.json").read_text())["settings"]
    assert settings["data_sha256"] != settings["checkpoint_sha256"]
    assert all(re.fullmatch("[0-9a-f]{64}", settings[name]) for name in ("data_sha256", "checkpoint_sha256"))


def test_failed_items_and_json(folder):
    lines = (folder / "clips/questions.jsonl").read_text().splitlines()[:4]
    lines.append(json.dumps({"id": "gone", "video": "gone.mp4", "question": "what shape is it", "answer": "star"}))
    (folder / "clips/val.jsonl").write_text("\n".join(lines))
    (folder / "answers.txt").write_text("blue\ncircle\ngrows\nnowhere\nred\nsquare\nleft")
    data = [
        "--data",
        folder / "clips",
        "--split",
        "val",
        "--task",
        "answer_ranking",
        "--candidates",
        folder / "answers.txt",
    ]
    done = run("evaluate", *data, "--out", folder / "ranked", "--option", "num_return=5", "--json", "--device", "cpu")
    assert done.exit_code == 2
    printed = json.loads(done.stdout)
    assert (printed["metrics"]["accuracy@5"], printed["settings"]["failed"], printed["settings"]["split"]) == (
        80.0,
        1,
        "val",
    )
    assert done.stderr.splitlines()[-1] == f"{folder / 'ranked'}: report.html and report.json; 5 items, 1 failed"
    found = json.loads(run("compare", folder / "ranked", folder / "ranked/report.json", "--json").stdout)
    assert (found["settings"], found["shared"], found["changed"], found["changes"]) == ({}, 5, 0, [])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"--metric": "cidr"}, "error: no metric 'cidr': choose from cider, "),
        ({"--task": "question_answering"}, "error: the item blue_circle_grows has no question and no answers, which "),
        ({"--tokenizer": "spacy"}, "error: no tokenizer 'spacy': choose one of python, java"),
        ({"--data": "none.jsonl"}, "error: none.jsonl: no such file or folder"),
        ({"--option": "beams=2"}, "error: captioning has no option beams; it has: num_beams, "),
    ],
)
def test_bad_options_are_one_line(changed, reason, tmp_path):
    usual = {"--data": CLIPS / "captions.jsonl", "--task": "captioning", "--out": tmp_path, "--metric": "exact_match"}
    done = run("evaluate", *(part for pair in {**usual, **changed}.items() for part in pair))
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith(reason)


def test_what_is_no_report(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    for path, reason in (
        (tmp_path, "this is not a report of mplug2-fast evaluate"),
        (tmp_path / "x", "no report can be"),
    ):
        done = run("compare", path, path)
        assert (done.exit_code, reason in done.stderr) == (2, True)


def test_two_scores_are_told_apart():
    """The same captions of a video, on two splits and with other references."""

    def report(split: str, names: str, right: dict[str, float], **settings) -> Report:
        items = [ItemResult(name, None, "a dog", right, {"cider": 60.0 + place}) for place, name in enumerate(names)]
        return Report(
            "captioning", {"cider": 80.0}, {"split": split, **settings}, {"cider": "pycocoevalcap 1.2"}, {}, items
        )

    one = report("1k-A", "abc", {"a dog": 1.0}, tokenizer="java")
    other = report("test", "bcde", {"a dog": 2.0}, tokenizer="python")
    other = dataclasses.replace(other, metrics={"cider": 69.0, "meteor": 20.0})
    found = compare(one, other)
    assert found.metrics == {"cider": (80.0, 69.0), "meteor": (None, 20.0)}
    assert found.settings == {"split": ("1k-A", "test"), "tokenizer": ("java", "python")}
    assert (found.shared, found.only, found.references_differ) == (2, (1, 2), 2)
    assert (found.score, found.shared_means, found.changed) == ("cider", (61.5, 60.5), 2)
    assert (found.changes[0].id, found.changes[0].scores) == ("b", (61.0, 60.0))
