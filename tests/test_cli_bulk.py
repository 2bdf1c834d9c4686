"""The commands with --out: the lines of the file, the messages on standard error, and the exit statuses."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import mplug2_fast as mf
from mplug2_fast import bulk
from mplug2_fast.bulk.journal import Journal
from mplug2_fast.cli import app
from mplug2_fast.cli import bulk as cli_bulk
from mplug2_fast.predict.predictor import TINY_MODEL
from tests.bulk.files import write_clip
from tests.test_cli import read_all

SEARCH = ["--num-beams", "2", "--max-length", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    (folder / "sub").mkdir()
    for seed, name in enumerate(("a.mp4", "b.mkv", "sub/c.avi")):
        write_clip(folder / name, {"mp4": "libx264", "mkv": "mjpeg", "avi": "mpeg4"}[name[-3:]], seed)
    (folder / "notes.md").touch()
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def told(result: Result) -> list[str]:
    """The lines on standard error, without those of every run."""
    usual = ("note: this is the included", "warning: mplug2_fast runs on its PyTorch fallbacks", "note: skipped 1 non-")
    return [line for line in result.stderr.splitlines() if not line.startswith(usual)]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_captions_of_a_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    result = run("caption", folder, "--out", out, *SEARCH)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "note: skipped 1 non-media file" in result.stderr
    (summary,) = told(result)
    assert summary.startswith(f"{out}: 3 captions, 0 failed; 3 videos in ")
    assert re.search(r" per second, model busy \d+% of the time$", summary)
    expected = {r.path: r.text for r in mf.Captioner(device="cpu").caption(folder.glob("**/*.*[4vi]"), num_beams=2)}
    assert [(line["path"], line["text"]) for line in lines(out)] == sorted(expected.items())

    again = run("caption", folder, folder / "a.mp4", folder / "none.mp4", "--out", out, *SEARCH)
    assert again.exit_code == 2
    assert told(again)[:2] == [
        "note: ignored 1 duplicate",
        "note: 3 videos already done, 1 to do",
    ]
    assert told(again)[2].startswith(f"{out}: 3 captions, 1 failed; 1 video in ")
    assert [line["error"] for line in lines(out)] == [None, None, None, "no such file"]

    done = run("caption", folder, folder / "none.mp4", "--out", out, *SEARCH)
    assert done.exit_code == 2  # there is one that failed
    assert told(done)[-1] == f"{out}: 3 captions, 1 failed; nothing left to do"


def test_options_of_the_clips(folder: Path, tmp_path: Path) -> None:
    run("caption", folder / "a.mp4", "--out", tmp_path / "frames", *SEARCH, "--frames", "3")
    (line,) = lines(tmp_path / "frames")
    assert line["frames"] == [0, 2, 4]
    options = ["--windows", "4", "--stride", "2", "--num-workers", "2", "--timeout", "99", "--batch-memory", "0.01"]
    run("caption", folder / "a.mp4", "--out", tmp_path / "windows", *SEARCH, *options, "--dtype", "bfloat16")
    (line,) = lines(tmp_path / "windows")
    assert line["frames"] == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert len(line["windows"]) == 2
    assert json.loads((tmp_path / "windows.run").read_text())["settings"]["dtype"] == "bfloat16"


def test_one_question_about_all_and_a_file_of_questions(folder: Path, tmp_path: Path) -> None:
    question = "what does the shape do?"
    result = run("answer", folder, "--question", question, "--out", tmp_path / "a", *SEARCH)
    assert result.exit_code == 0
    assert told(result)[-1].startswith(f"{tmp_path / 'a'}: 3 answers, 0 failed; 3 videos in ")
    assert [(line["path"], line["question"]) for line in lines(tmp_path / "a")] == [
        (str(folder / name), question) for name in ("a.mp4", "b.mkv", "sub/c.avi")
    ]

    asked = [{"path": str(folder / "a.mp4"), "question": q, "id": i} for i, q in enumerate((question, "日本?"))]
    (tmp_path / "q.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in asked))
    choices = ["--candidate", "red", "--candidate", "moves left", "--num-return", "2"]
    result = run("answer", "--questions", tmp_path / "q.jsonl", "--out", tmp_path / "b", *choices, "--device", "cpu")
    assert result.exit_code == 0
    assert told(result)[0] == "note: the model does not know these words of the question: 日, 本"
    found = lines(tmp_path / "b")
    assert [{name: line[name] for name in ("path", "question", "id")} for line in found] == asked
    assert {item["text"] for item in found[0]["alternatives"]} == {"red", "moves left"}


def test_features(folder: Path, tmp_path: Path) -> None:
    options = ["--kind", "pooled", "--format", "npy", "--device", "cpu"]
    result = run("features", folder, "--out", tmp_path / "new" / "features", *options)
    assert result.exit_code == 0
    found = dict(bulk.read_features(tmp_path / "new" / "features"))
    assert {path: tuple(rows.shape) for path, rows in found.items()} == {
        str(folder / name): (1, 128) for name in ("a.mp4", "b.mkv", "sub/c.avi")
    }
    assert told(result)[-1].startswith(f"{tmp_path / 'new' / 'features' / 'index.jsonl'}: 3 features, 0 failed; ")
    refused = run("features", folder, "--out", tmp_path / "new" / "features", *options, "--frames", "2")
    assert (refused.exit_code, told(refused)[-1].startswith("error: ")) == (2, True)
    assert "frames=4 (now 2)" in told(refused)[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "x.mp4", "--frames", "4"], "--frames: only with --out"),
        (["caption", "x.mp4", "--num-workers", "1", "--batch-memory", "2"], "--num-workers, --batch-memory: only with"),
        (["caption", "x.mp4", "--out", "OUT", "--stride", "4"], "--stride: only with --windows"),
        (["caption", "x.mp4", "--out", "OUT", "--windows", "4", "--frames", "4"], "--frames and --windows: use one of"),
        (["caption", "x.mp4", "--out", "OUT", "--num-return", "9"], "num_return must be from 1 to num_beams"),
        (["caption", "x.mp4", "--out", "OUT/none/a"], "the results cannot be written: No such file"),
        (["caption", "none.txt", "--out", "OUT"], "none.txt: a list of videos cannot be read"),
        (["answer", "--questions", "q.jsonl"], "--questions: only with --out"),
        (["answer", "x.mp4", "--question", "?", "--out", "OUT"], "the question is empty"),
        (["caption", "x.mp4", "--decoder", "pyav"], "--decoder: only with --out"),
        (["caption", "x.mp4", "--out", "OUT", "--decoder", "dali", "--timeout", "9"], "which decodes in this process"),
        (["features", "x.mp4", "--out", "OUT", "--format", "npy", "--dtype", "bfloat16"], "npy files cannot store"),
        (["caption", "x.mp4", "--retry-failed"], "--retry-failed: only with --out"),
        (["caption", "x.mp4", "--out", "OUT", "--timeout", "inf"], "--timeout must be from 0.1 to 1,000,000 seconds"),
        (["caption", "x.mp4", "--out", "OUT", "--timeout", "nan"], "--timeout must be from 0.1 to 1,000,000 seconds"),
        (["caption", "x.mp4", "--out", "OUT", "--batch-memory", "inf"], "--batch-memory must be from 0.001 to 1,000,0"),
        (["caption", "x.mp4", "--out", "OUT", "--batch-memory", "nan"], "--batch-memory must be from 0.001 to 1,000,0"),
        (["caption", "x.mp4", "--out", "OUT", "--frames", "9" * 30], "frames: a clip takes about"),
        (["caption", "x.mp4", "--out", "OUT", "--windows", "9" * 30], "frames: a clip takes about"),
        (["caption", "x.mp4", "--out", "OUT", "--windows", "4", "--stride", "9" * 30], "--stride must be from 1 to"),
        (["caption", "x.mp4", "--out", "OUT", "--num-beams", "999999999"], "num_beams 999,999,999: a clip takes about"),
        (["caption", "x.mp4", "--num-beams", "999999999"], "num_beams 999,999,999: a clip takes about"),
        (["caption", "x.mp4", "--out", ""], "--out is empty: name the output file"),
        (["caption", "", "--out", "OUT"], "a path is empty: name a file"),
        (["caption", "x.mp4", "--out", "/dev/full"], "/dev/full is not a regular file"),
        (["caption", "x.mp4", "--out", "/proc/x"], "/proc/x: the results cannot be written"),
        (["features", "x.mp4", "--out", "/proc/x"], "/proc/x: the features cannot be written there"),
        (["caption", "/dev/zero.txt", "--out", "OUT"], "a list of videos cannot be read"),
        (
            ["answer", "x.mp4", "--question", "what\udcff", "--out", "OUT"],
            "the question has characters that are not UTF",
        ),
        (["answer", "x.mp4", "--question", "what " * 60, "--out", "OUT"], "the question has 60 words, at most 50"),
        (
            ["answer", "x.mp4", "--question", "w" * 99999, "--out", "OUT"],
            "the question is longer than 10,000 characters",
        ),
        (
            ["answer", "x.mp4", "--question", "what?", "--candidate", "\udcff"],
            "a candidate has characters that are not",
        ),
        (
            ["answer", "x.mp4", "--question", "what?", "--candidates", "/dev/zero"],
            "candidates cannot be read: it is not",
        ),
        (["caption", "x.mp4", "--checkpoint", "none.pth"], "none.pth"),
        (["caption", "x.mp4", "--device", "cuda:99"], "there is no CUDA device 99"),
        (["caption", "x.mp4", "--device", "abacus"], "there is no device 'abacus'"),
        (["caption", "x.mp4", "--max-length", "99"], "max_length must be from 1 to 32"),
        (["convert", TINY_MODEL, TINY_MODEL], "is not empty"),
        (["convert", TINY_MODEL, "/proc/x"], "/proc/x: the checkpoint cannot be written"),
        (["convert", TINY_MODEL, "x" * 300], "x: the checkpoint cannot be written: File name too"),
    ],
)
def test_what_is_refused_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(*(str(argument).replace("OUT", str(tmp_path / "a.jsonl")) for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert [message in line for line in told(result)] == [True], result.stderr
    assert told(result)[0].startswith("error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["caption"],
        ["caption", "x.mp4", "--dtype", "int4"],
        ["answer", "x.mp4"],
        ["answer", "x.mp4", "--questions", "q.jsonl"],
        ["answer", "--question", "what?"],
        ["answer", "x.mp4", "--question", "what?", "--questions", "q.jsonl", "--out", "a"],
        ["features", "x.mp4"],
        ["features", "x.mp4", "--out", "a", "--kind", "audio"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage" in result.stderr


def test_a_second_run_on_one_output_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with Journal(out, lambda line: line["path"], {}):
        result = run("caption", folder, "--out", out, *SEARCH)
    assert (result.exit_code, told(result)[-1]) == (
        2,
        f"error: {out}: another run is writing to it: wait for it, or use another output",
    )


def test_an_environment_that_torchrun_did_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    result = run("caption", "x.mp4", "--out", tmp_path / "a")
    assert (result.exit_code, told(result)) == (
        2,
        ["error: LOCAL_WORLD_SIZE must be a number, at least 1, not '0': correct it, or unset torchrun's variables"],
    )


def test_no_more_processes_than_there_is_work_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    result = run("caption", folder / "a.mp4", "--out", tmp_path / "a", *SEARCH, "--num-workers", "5000")
    assert told(result)[0] == "note: --num-workers reduced from 5,000 to 1: there is work for 1 video only"
    result = run("caption", folder, "--out", tmp_path / "b", *SEARCH, "--num-workers", "5000")
    assert told(result)[0] == "note: --num-workers reduced from 5,000 to 2: there is work for 2 cores only"


def test_skipped_files_are_notes_and_unreadable_folders_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, far = tmp_path / "in", tmp_path / "far"
    (folder / "closed").mkdir(parents=True)
    far.mkdir()
    write_clip(folder / "a.mp4", "libx264", 0)
    write_clip(far / "b.mkv", "mjpeg", 1)
    for name in ("._a.mp4", ".hidden.mp4"):
        (folder / name).touch()
    for name, target in (("link", far), ("loop", folder)):
        (folder / name).symlink_to(target)

    def scandir(path: str, real: object = os.scandir) -> object:
        if path.endswith("closed"):  # for root, everything is permitted
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    result = run("caption", folder, "--out", tmp_path / "a", *SEARCH)
    assert [line["path"] for line in lines(tmp_path / "a")] == [f"{folder}/a.mp4", f"{folder}/link/b.mkv"]
    assert (result.exit_code, told(result)[:2], told(result)[3]) == (
        2,
        [
            "note: skipped 2 hidden files and folders",
            "note: skipped 1 link to a folder whose videos are included already",
        ],
        f"error: {folder}/closed: the folder cannot be read: Permission denied",
    )
    assert " 2 captions, 0 failed" in told(result)[2]


def test_an_output_that_is_removed_during_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.jsonl"
    append = Journal.append

    def removing(journal: Journal, found: list[dict]) -> None:
        append(journal, found)
        out.unlink(missing_ok=True)

    options = [*SEARCH, "--batch-memory", "0.001"]
    monkeypatch.setattr(Journal, "append", removing)
    result = run("caption", folder, "--out", out, *options)
    assert (result.exit_code, told(result)) == (
        2,
        [
            f"error: {out} was removed or replaced during the run: its lines were written there again. Rerun the same "
            "command to resume"
        ],
    )
    kept = lines(out)
    assert 1 <= len(kept) <= 3
    monkeypatch.setattr(Journal, "append", append)
    assert run("caption", folder, "--out", out, *options).exit_code == 0
    assert lines(out)[: len(kept)] == kept
    assert len(lines(out)) == 3


def test_failed_files_are_done_again(folder: Path, tmp_path: Path) -> None:
    out, late = tmp_path / "a.jsonl", tmp_path / "late.mp4"
    assert run("caption", folder / "a.mp4", late, "--out", out, *SEARCH).exit_code == 2
    write_clip(late, "libx264", 5)
    assert run("caption", folder / "a.mp4", late, "--out", out, *SEARCH).exit_code == 2
    result = run("caption", folder / "a.mp4", late, "--out", out, *SEARCH, "--retry-failed")
    assert result.exit_code == 0
    assert [line["error"] for line in lines(out)] == [None, None]
    assert told(result)[-1].startswith(f"{out}: 2 captions, 0 failed; 1 video in ")


def test_candidates_as_other_systems_write_them(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"\xef\xbb\xbfred\r\nblue\r\n\r\n")
    arguments = ["answer", folder / "a.mp4", "--question", "what?", "--candidates", tmp_path / "c", "--num-return", "2"]
    assert {line.split("\t")[1] for line in run(*arguments).stdout.splitlines()} == {"red", "blue"}


def test_progress_where_nobody_looks_is_a_line_now_and_then(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bulk, "SECONDS_BETWEEN_NOTES", 0.0)
    result = run("caption", folder, "none.mp4", "--out", tmp_path / "a", *SEARCH, "--batch-memory", "0.001")
    counts = [line for line in told(result) if " of 4 videos, " in line]
    assert counts[-1].startswith("4 of 4 videos, 1 failed, ")
    assert counts[-1].endswith("/s, 0.0 s left")


def test_progress_on_a_terminal_is_a_bar(folder: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    command = [sys.executable, "-m", "mplug2_fast", "caption", str(folder), "none.mp4", "--out", str(tmp_path / "a")]
    with subprocess.Popen([*command, *SEARCH], stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = read_all(ours)
        assert process.stdout.read() == b""
    assert process.returncode == 2
    assert "4/4" in shown
    assert "1 failed" in shown
    assert "/s," in shown
    assert f"{tmp_path / 'a'}: 3 captions, 1 failed; 4 videos in " in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (61, "61 s"), (150, "2 min"), (6000, "1 h 40 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert cli_bulk._duration(seconds) == text


@pytest.mark.parametrize(
    ("device", "cores", "workers"),
    [("cpu", 2, 1), ("cpu", 32, 4), ("cuda", 2, 1), ("cuda", 8, 7), ("cuda", 64, 16), ("cuda", 0, 1)],
)
def test_the_usual_number_of_workers(device: str, cores: int, workers: int) -> None:
    assert cli_bulk._usual_workers(device, cores) == workers
