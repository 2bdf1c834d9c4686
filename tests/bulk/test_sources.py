"""What folders, lists and questions name: each video once, in an order that does not change."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

from mplug2_fast.bulk import Question, Source, ask_all, find_videos, read_questions
from mplug2_fast.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.mp4", "a.MKV", "sub/c.webm", "sub/deep/d.gif", "sub/notes.md", "z/e.png", "poster.psd"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paths(*named: str) -> list[str]:
    return [video.path for video in find_videos(named).videos]


def test_a_folder_stands_for_the_videos_below_it(folder: Path) -> None:
    found = find_videos(["in"])
    assert [video.path for video in found.videos] == [
        "in/a.MKV",
        "in/b.mp4",
        "in/sub/c.webm",
        "in/sub/deep/d.gif",
        "in/z/e.png",
    ]
    assert (found.passed_over, found.repeated, found.empty) == (2, 0, ())
    assert paths(str(folder / "in" / "z")) == [str(folder / "in/z/e.png")]


def test_files_that_are_named_are_taken_whatever_they_are(folder: Path) -> None:
    assert paths("in/poster.psd", "missing.mp4", "in/a.MKV") == ["in/poster.psd", "missing.mp4", "in/a.MKV"]


def test_what_is_named_again_is_done_once_where_it_was_named_first(folder: Path) -> None:
    found = find_videos(["in/b.mp4", "./in//b.mp4", "in", Path("in/b.mp4"), "in/sub/../b.mp4"])
    assert [video.path for video in found.videos][:2] == ["in/b.mp4", "in/a.MKV"]
    assert found.videos[-1].path == "in/sub/../b.mp4"  # with links, that may be another file
    assert (len(found.videos), found.repeated) == (6, 3)


def test_lists_name_files_and_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "list.txt").write_bytes(b"in/z\r\n\n  spaced .mp4\nother.txt\n\xff.mp4\nlast.mp4")
    expected = ["in/z/e.png", "  spaced .mp4", "other.txt", "\udcff.mp4", "last.mp4"]
    assert paths("list.txt") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((folder / "list.txt").read_bytes())))
    assert paths("first.mp4", "-") == ["first.mp4", *expected]


def test_folders_without_videos_are_told(folder: Path) -> None:
    (folder / "none").mkdir()
    (folder / "folder.txt").mkdir()
    assert find_videos(["none", "in", "folder.txt"]).empty == ("none", "folder.txt")


def test_nothing_to_do_is_an_error(folder: Path) -> None:
    (folder / "empty.txt").touch()
    (folder / "none").mkdir()
    for named in ([], ["none"], ["empty.txt", "none"]):
        with pytest.raises(ConfigError, match="there are no videos in"):
            find_videos(named)
    with pytest.raises(ConfigError, match=r"missing\.txt: the list cannot be read: No such file"):
        find_videos(["missing.txt"])


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is permitted to root")
def test_folders_that_may_not_be_read(folder: Path) -> None:
    (folder / "in" / "sub").chmod(0)
    with pytest.raises(ConfigError, match="in/sub: the folder cannot be read: Permission denied"):
        find_videos(["in"])


def test_one_question_about_all(folder: Path) -> None:
    found = ask_all(find_videos(["in/a.MKV", "x.mp4", "x.mp4"]), "what is it?")
    assert found.videos == [Source(path, (Question("what is it?"),)) for path in ("in/a.MKV", "x.mp4")]
    assert found.repeated == 1


def write_jsonl(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_questions_are_gathered_by_video(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "q.jsonl",
        {"path": "a.mp4", "question": "what?", "id": 1, "answer": "nothing of ours"},
        {"question": "who?", "path": "b.mp4"},
        "",
        {"path": "./a.mp4", "question": "what?", "id": "one"},
        {"path": "a.mp4", "question": "what?", "id": 1},
        {"path": "a.mp4", "question": "what?"},
    )
    found = read_questions(file)
    assert found.videos == [
        Source("a.mp4", (Question("what?", 1), Question("what?", "one"), Question("what?"))),
        Source("b.mp4", (Question("who?"),)),
    ]
    assert found.repeated == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: this is not JSON"),
        ("[]", "line 2: this is not a JSON object"),
        ({"question": "what?"}, "line 2: the object needs a 'path' that is a text"),
        ({"path": "a", "question": 3}, "line 2: the object needs a 'question' that is a text"),
        ({"path": "\ud800.mp4", "question": "what?"}, "line 2: no file can have this 'path'"),
        ({"path": " ", "question": "what?"}, "needs a 'path'"),
        ({"path": "a", "question": "what?", "id": 1.5}, "the 'id' must be a text or an integer"),
        ({"path": "a", "question": "what?", "id": True}, "the 'id' must be"),
    ],
)
def test_lines_that_are_no_questions(tmp_path: Path, line: object, message: str) -> None:
    file = write_jsonl(tmp_path / "q.jsonl", {"path": "a", "question": "what?"}, line)
    with pytest.raises(ConfigError, match=message):
        read_questions(file)


def test_a_file_without_questions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no questions"):
        read_questions(write_jsonl(tmp_path / "q.jsonl", ""))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
