"""The videos of folders, lists and questions: each once, in a fixed order."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

from mplug2_fast.bulk import Question, Source, ask_all, find_videos, lists, read_questions
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
    assert (found.not_media, found.repeated, found.empty) == (2, 0, ())
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
        with pytest.raises(ConfigError, match="no videos or images in"):
            find_videos(named)
    with pytest.raises(ConfigError, match=r"missing\.txt: a list of videos cannot be read: No such file"):
        find_videos(["missing.txt"])


def test_a_folder_that_may_not_be_read_costs_only_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: str, real: object = os.scandir) -> object:
        if path.endswith("sub"):  # for root, everything is permitted
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = find_videos(["in"])
    assert [video.path for video in found.videos] == ["in/a.MKV", "in/b.mp4", "in/z/e.png"]
    assert found.unreadable == ("in/sub: the folder cannot be read: Permission denied",)
    with pytest.raises(ConfigError, match="in/sub: the folder cannot be read: Permission denied"):
        find_videos(["in/sub"])


def test_links_to_folders_are_followed_and_no_folder_is_read_twice(folder: Path) -> None:
    (folder / "elsewhere" / "deep").mkdir(parents=True)
    (folder / "elsewhere" / "deep" / "far.mp4").touch()
    (folder / "elsewhere" / "deep" / "back").symlink_to(folder / "in")
    (folder / "in" / "sub" / "a link").symlink_to(folder / "elsewhere")
    for name, target in (
        ("a loop", "."),
        ("above", "sub"),
        ("again", "../elsewhere/deep"),
        ("up", ".."),
        ("no", "gone"),
    ):
        (folder / "in" / name).symlink_to(target)
    (folder / "in" / "file.mp4").symlink_to("b.mp4")
    (folder / "in" / "gone.mp4").symlink_to("nothing.mp4")
    (folder / "in" / "itself.mp4").symlink_to("itself.mp4")
    found = find_videos(["in"])
    own = ["in/a.MKV", "in/b.mp4", "in/file.mp4", "in/gone.mp4", "in/itself.mp4", "in/sub/c.webm", "in/sub/deep/d.gif"]
    assert [video.path for video in found.videos] == [*own, "in/z/e.png", "in/again/far.mp4"]
    # a loop, above, back, and of `up` those to `in` and to `deep` within `elsewhere`, and `a link`
    assert (found.linked_again, found.not_media) == (6, 3)


def test_hidden_files_and_what_macos_leaves_are_skipped(folder: Path) -> None:
    for name in ("._b.mp4", ".c.mp4", "__MACOSX/._b.mp4", ".Trash/old.mp4", "sub/.d.mkv"):
        (folder / "in" / name).parent.mkdir(exist_ok=True)
        (folder / "in" / name).touch()
    found = find_videos(["in"])
    assert len(found.videos) == 5
    assert found.hidden == 5
    assert paths("in/._b.mp4", "in/.Trash") == ["in/._b.mp4", "in/.Trash/old.mp4"]  # named, they are wanted


def test_an_empty_path_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="a path is empty"):
        find_videos(["in", ""])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xef\xbb\xbfin/z\r\nb.mp4\r\n", ["in/z/e.png", "b.mp4"]),
        (b"a.mp4\n\xef\xbb\xbfb.mp4\n", ["a.mp4", "b.mp4"]),  # two files in one
        (b"a.mp4\r\n\r\n \t\r\n", ["a.mp4"]),
        (b"a\rb.mp4\n", ["a\rb.mp4"]),
    ],
)
def test_lists_as_other_systems_write_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, expected: list[str]
) -> None:
    (folder / "list.txt").write_bytes(data)
    assert paths("list.txt") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert paths("-") == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("ä.mp4\n".encode("utf-16"), "list.txt: this is UTF-16 text: save it as UTF-8"),
        ("a.mp4\n".encode("utf-16-be"), "list.txt, line 1: it has a NUL byte"),
        ("a.mp4\n".encode("utf-32"), "UTF-16 text"),
        (b"a.mp4\nb\0.mp4\n", "list.txt, line 2: it has a NUL byte"),
        (b"a.mp4\n" + b"x" * 100_000, "list.txt, line 2: it is longer than 65,536 bytes: this is not a list of videos"),
    ],
)
def test_lists_that_are_none(folder: Path, data: bytes, message: str) -> None:
    (folder / "list.txt").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        find_videos(["list.txt"])


def test_lists_and_questions_that_never_end_or_never_begin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo("pipe.txt")
    for name, target in (("zero.txt", "/dev/zero"), ("random.txt", "/dev/urandom"), ("null.txt", "/dev/null")):
        Path(name).symlink_to(target)
    for name in ("pipe.txt", "zero.txt", "random.txt", "null.txt"):
        with pytest.raises(ConfigError, match=rf"{name}: a list of videos cannot be read: it is not a regular file"):
            find_videos([name])
        with pytest.raises(ConfigError, match=rf"{name}: a file of questions cannot be read: it is not a"):
            read_questions(name)
    with pytest.raises(ConfigError, match="it is a folder"):
        read_questions("in")
    with open("/dev/zero", "rb") as zero:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(zero))
        with pytest.raises(ConfigError, match="-, line 1: it has a NUL byte"):
            find_videos(["-"])
    monkeypatch.setattr(lists, "MAX_LINES", 3)
    Path("many.txt").write_text("a.mp4\n" * 4)
    with pytest.raises(ConfigError, match=r"many.txt: it has more than 3 lines: split it"):
        find_videos(["many.txt"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="-: standard input is closed"):
        find_videos(["-"])


def test_questions_from_the_end_of_a_pipe(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.write(theirs, b'{"path": "a.mp4", "question": "what?"}\n')
    os.close(theirs)
    try:  # as a shell writes <(...)
        assert read_questions(f"/dev/fd/{ours}").videos == [Source("a.mp4", (Question("what?"),))]
    finally:
        os.close(ours)


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
    pair = {"images": ["./a.png", "b.png"], "question": "are both red?"}
    (two,) = read_questions(write_jsonl(tmp_path / "q.jsonl", pair, pair)).videos
    assert (two.path, two.files) == ("a.png and b.png", ("a.png", "b.png"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"images": ["a"], "question": "what?"}, "line 2: 'images' must be a list of two paths"),
        ("{", "line 2: this is not JSON"),
        ("[]", "line 2: this is not a JSON object"),
        ({"question": "what?"}, "line 2: the object needs a text 'path'"),
        ({"path": "a", "question": 3}, "line 2: the object needs a text 'question'"),
        ({"path": "\ud800.mp4", "question": "what?"}, "line 2: no file can have this 'path'"),
        ({"path": " ", "question": "what?"}, "needs a text 'path'"),
        ({"path": "a", "question": "what?", "id": 1.5}, "the 'id' must be a text or an integer"),
        ({"path": "a", "question": "what?", "id": True}, "the 'id' must be"),
        ({"path": "a", "question": "what\ud800?"}, "line 2: the 'question' has characters that are not UTF-8"),
        ({"path": "a\0.mp4", "question": "what?"}, "line 2: no file can have this 'path': it has a NUL"),
        ("[" * 100_000, "line 2: this is not JSON: its brackets are nested too deeply"),
        ('{"a":' * 100_000, "line 2: this is not JSON: its brackets are nested too deeply"),
        ('{"id": ' + "9" * 5000 + "}", "line 2: this is not JSON"),
    ],
)
def test_lines_that_are_no_questions(tmp_path: Path, line: object, message: str) -> None:
    file = write_jsonl(tmp_path / "q.jsonl", {"path": "a", "question": "what?"}, line)
    with pytest.raises(ConfigError, match=message):
        read_questions(file)


def test_questions_with_a_byte_order_mark(tmp_path: Path) -> None:
    line = json.dumps({"path": "a", "question": "what?"}).encode()
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n")
    assert read_questions(tmp_path / "q.jsonl").videos == [Source("a", (Question("what?"),))]
    (tmp_path / "q.jsonl").write_bytes(line.replace(b"what", b"what\xff"))
    with pytest.raises(ConfigError, match="line 1: the 'question' has characters that are not UTF-8"):
        read_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_bytes(line.replace(b'"a"', b'"a\xff.mp4"'))
    assert read_questions(tmp_path / "q.jsonl").videos[0].path == "a\udcff.mp4"  # names may be any bytes


def test_a_file_without_questions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no questions: a line"):
        read_questions(write_jsonl(tmp_path / "q.jsonl", ""))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
