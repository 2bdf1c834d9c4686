"""The journal has whole lines only, one writer at a time, and never overwrites another file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mplug2_fast.bulk.journal import Journal, read_lines, settings_file, write_whole
from mplug2_fast.errors import ConfigError, MPlug2Error

SETTINGS = {"command": "caption", "num_beams": 5, "windows": (16, 8)}


def line(path: str, error: str | None = None, **more: object) -> dict:
    return {"path": path, "error": error, **more}


def journal(path: Path, settings: dict | None = None, **choices: int) -> Journal:
    return Journal(path, lambda line: line["path"], SETTINGS if settings is None else settings, choices)


def lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_lines_are_appended_and_known_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with journal(path) as opened:
        assert opened.done == {}
        opened.append([line("a"), line("b", "is empty")])
        opened.append([])
        assert len(lines(path)) == 2  # before it is closed
        assert opened.done == {"a": False, "b": True}
    with journal(path) as opened:
        assert opened.done == {"a": False, "b": True}
        opened.append([line("a", text="another"), line("c"), line("c", text="twice at once")])
    assert lines(path) == [line("a"), line("b", "is empty"), line("c")] == list(read_lines(path))


def test_names_of_any_bytes(tmp_path: Path) -> None:
    names = ["ä\udcff.mp4", "a\nb\t.mp4", "\u2028.mp4", "a\0b"]
    with journal(tmp_path / "a.jsonl") as opened:
        opened.append(line(name) for name in names)
    with journal(tmp_path / "a.jsonl") as opened:
        assert list(opened.done) == names
    assert len((tmp_path / "a.jsonl").read_bytes().split(b"\n")) == 5


def test_a_file_that_ends_anywhere_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with journal(path) as opened:
        opened.append([line("a"), line("b", text="ä")])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(1, len(whole) + 1):
        path.write_bytes(whole[:size])
        with journal(path) as opened:
            assert list(opened.done) == ["a", "b"][: whole[:size].count(b"\n")]
            assert path.stat().st_size in (0, first, len(whole))
            opened.append([line("a"), line("b", text="ä")])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("hole", [b"\0" * 100, b'{"path": "b", "er\0\0\0\0\n', b"\0\0\n\0"])
def test_what_a_machine_without_power_left_is_cut_off(tmp_path: Path, hole: bytes) -> None:
    path = tmp_path / "a.jsonl"
    with journal(path) as opened:
        opened.append([line("a")])
    whole = path.read_bytes()
    path.write_bytes(whole + hole + b'{"path": "c", "error": null}\n')
    with journal(path) as opened:
        assert list(opened.done) == ["a"]
    assert path.read_bytes() == whole


ALIENS = [
    b"hello\n",
    b"[1]\n",
    b'{"path": "b"}\n',
    b"3\n",
    b"null\n",
    b"[" * 100_000 + b"\n",
    b'{"path": ["b"], "error": null}\n',
    b'{"path": "b", "error": 3}\n',
    b'{"path": "b", "error": {}}\n',
    b"\xff\xfe\n",
]


@pytest.mark.parametrize("alien", ALIENS, ids=lambda alien: str(alien[:30]))
def test_a_line_that_is_something_else_is_left_alone(tmp_path: Path, alien: bytes) -> None:
    path = tmp_path / "a.jsonl"
    with journal(path) as opened:
        opened.append([line("a")])
    data = path.read_bytes() + alien + b'{"path": "c", "error": null}\n'
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 2: this is not a result"):
        journal(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("data", [b"hello", b"a video\n", b'{"path": "a", "error": null}\n'])
def test_a_file_that_no_run_began_is_left_alone(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"a\.mp4 exists, but .*a\.mp4\.run, which every run keeps"):
        journal(path)
    assert path.read_bytes() == data
    settings = Path(settings_file(str(path)))
    for text in (
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"settings": {}}',
        "x" * 2**21,
        '{"settings": null, "choices": {}}',
    ):
        settings.write_text(text)
        with pytest.raises(ConfigError, match="cannot be read: use another output"):
            journal(path)
        assert path.read_bytes() == data
    for size in (0, -1, True, 1.5, "4", None, []):
        settings.write_text(json.dumps({"settings": SETTINGS, "choices": {"batch_size": size}}))
        with pytest.raises(ConfigError, match="cannot be read: use another output"):
            journal(path, batch_size=4)
    settings.unlink()
    os.mkfifo(settings)  # does not wait for a writer
    with pytest.raises(ConfigError, match="cannot be read: use another output"):
        journal(path)
    settings.unlink()
    settings.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="cannot be read: use another output"):
        journal(path)


def test_settings_may_not_change_while_there_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    other = {**SETTINGS, "num_beams": 3}
    journal(path).close()
    with journal(path, other) as opened:  # there are none yet
        opened.append([line("a")])
    with pytest.raises(
        ConfigError, match=r"was started with num_beams=3 \(now 5\)\. Use the original options or another"
    ):
        journal(path)
    with pytest.raises(ConfigError, match=r"kind=None \(now 'pooled'\)"):
        journal(path, {**other, "kind": "pooled"})
    path.unlink()
    journal(path).close()


def test_choices_stay_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with journal(path, batch_size=4) as opened:
        assert opened.choices == {"batch_size": 4}
        opened.append([line("a")])
    with journal(path, batch_size=8) as opened:
        assert opened.choices == {"batch_size": 4}


def test_the_second_of_two_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def other() -> str:
        """The error that another process gets."""
        ours, theirs = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                journal(path).close()
                os.write(theirs, b"opened")
            except ConfigError as error:
                os.write(theirs, str(error).encode())
            finally:
                os._exit(0)
        os.close(theirs)
        os.waitpid(process, 0)
        with open(ours) as answer:
            return answer.read()

    with journal(path) as opened:
        opened.append([line("a")])
        with pytest.raises(ConfigError, match="another run is writing to it"):
            journal(path)
        assert other() == f"{path}: another run is writing to it: wait for it, or use another output"
    assert other() == "opened"


def test_a_file_that_was_replaced_while_its_lock_was_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    monkeypatch.setattr("fcntl.flock", lambda *_: path.unlink())
    with pytest.raises(ConfigError, match="another run"):
        journal(path)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with pytest.raises(ConfigError, match=r"a\.jsonl cannot be locked \(No locks available\)"):
        journal(tmp_path / "a.jsonl")


def test_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "none" / "a.jsonl", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "is not a regular file"),
        (Path("/dev/null"), "is not a regular file"),
    ):
        with pytest.raises(ConfigError, match=reason):
            journal(path)
    with pytest.raises(MPlug2Error, match="cannot be written: No such file"):
        write_whole(tmp_path / "none" / "a", b"")


def test_a_full_disk_costs_no_line_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    write = os.write
    with journal(path) as opened:
        opened.append([line("a")])

        def full(file: int, data: bytes) -> int:
            monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            return write(file, data[:10])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(MPlug2Error, match=r"a\.jsonl: the results cannot be written: No space left"):
            opened.append([line("b"), line("c")])
        assert list(opened.done) == ["a"]
    monkeypatch.undo()
    with journal(path) as opened:
        assert list(opened.done) == ["a"]
        opened.append([line("b")])
    assert [found["path"] for found in lines(path)] == ["a", "b"]


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with journal(tmp_path / "a.jsonl") as opened:
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
        opened.append([line("a"), line("b")])
    assert lines(tmp_path / "a.jsonl") == [line("a"), line("b")]


def test_lines_reach_the_disk_at_least_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, synced = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with journal(tmp_path / "a.jsonl") as opened:
        monkeypatch.setattr(os, "fsync", synced.append)
        for path, seconds, count in (("a", 0.0, 0), ("b", 0.6, 0), ("c", 0.6, 1), ("d", 0.6, 1), ("e", 5.0, 2)):
            now[0] += seconds
            opened.append([line(path)])
            assert len(synced) == count
    assert len(synced) == 3


def test_what_is_written_whole_and_what_is_removed(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"one")
    write_whole(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    path = tmp_path / "b.jsonl"
    with journal(path) as opened:
        opened.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# --- what others do to the file during a run --------------------------------------------------------------------------


def test_a_file_that_is_removed_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    opened = journal(path, batch_size=4)
    opened.append([line("a")])
    path.unlink()
    with pytest.raises(MPlug2Error, match=r"a\.jsonl was removed or replaced during the run: its lines were written"):
        opened.append([line("b")])
    opened.close()  # says nothing more
    with journal(path, batch_size=9) as again:
        assert (list(again.done), again.choices) == (["a", "b"], {"batch_size": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.run"]


def test_a_file_that_is_removed_with_its_settings_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    opened = journal(path, batch_size=4)
    opened.append([line("a")])
    path.unlink()
    Path(settings_file(str(path))).unlink()
    with pytest.raises(MPlug2Error, match="its lines were written there again"):
        opened.close()
    with journal(path) as again:
        assert list(again.done) == ["a"]


def test_the_lines_of_a_file_that_is_replaced_are_kept_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    (tmp_path / "a.jsonl.recovered").write_text("of another day")
    opened = journal(path)
    opened.append([line("a")])
    (tmp_path / "other").write_text("somebody else's")
    (tmp_path / "other").rename(path)
    with pytest.raises(MPlug2Error, match=r"its lines are in .*a\.jsonl\.recovered-1 now. Use that"):
        opened.append([line("b")])
    opened.close()
    assert path.read_text() == "somebody else's"
    with journal(tmp_path / "a.jsonl.recovered-1") as again:
        assert list(again.done) == ["a", "b"]


def test_the_lines_of_a_file_whose_folder_is_removed_are_kept_above_it(tmp_path: Path) -> None:
    folder = tmp_path / "one" / "two"
    folder.mkdir(parents=True)
    opened = journal(folder / "a.jsonl")
    opened.append([line("a")])
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(MPlug2Error, match=r"its lines are in .*a\.jsonl\.recovered now"):
        opened.append([line("b")])
    opened.close()
    with journal(tmp_path / "a.jsonl.recovered") as again:
        assert list(again.done) == ["a", "b"]


def test_a_file_that_is_moved_is_found(tmp_path: Path) -> None:
    path, moved = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    opened = journal(path)
    path.rename(moved)
    with pytest.raises(MPlug2Error, match=rf"was moved to {moved} during the run: move it back"):
        opened.append([line("a")])
    opened.close()
    moved.rename(path)
    with journal(path) as again:
        assert list(again.done) == ["a"]


@pytest.mark.parametrize("change", [b"", b"another line\n"])
def test_a_file_that_another_program_writes_to(tmp_path: Path, change: bytes) -> None:
    path = tmp_path / "a.jsonl"
    opened = journal(path)
    opened.append([line("a")])
    with open(path, "ab" if change else "wb") as file:
        file.write(change)
    with pytest.raises(MPlug2Error, match=r"a\.jsonl was changed by another program during the run"):
        opened.append([line("b")])
    opened.close()


def test_lines_that_can_be_saved_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = journal(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(MPlug2Error, match=r"removed or replaced .* and its lines cannot be saved: No space left"):
        opened.append([line("a")])
    opened.close()


def test_settings_that_are_removed_are_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    opened = journal(path, batch_size=4)
    opened.append([line("a")])
    Path(settings_file(str(path))).unlink()
    with pytest.warns(UserWarning, match=r"a\.jsonl\.run was removed during the run and is written again"):
        opened.close()
    with journal(path, batch_size=9) as opened:
        assert opened.choices == {"batch_size": 4}


def test_failed_lines_are_dropped_at_once_and_under_the_lock(tmp_path: Path) -> None:
    path, link = tmp_path / "a.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(path)
    with journal(link) as opened:
        opened.append([line("a"), line("b", "died", transient=True), line("c", "corrupt"), line("d", "late")])
        opened.drop_failed(["a", "b", "d", "never seen"])
        assert opened.done == {"a": False, "c": True}
        with pytest.raises(ConfigError, match="another run is writing to it"):
            journal(link)
        opened.append([line("b")])
    assert link.is_symlink()
    assert lines(path) == [line("a"), line("c", "corrupt"), line("b")]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "link.jsonl", "link.jsonl.run"]


def test_what_is_kept_is_there_for_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with journal(path) as opened:
        assert opened.kept == {}
        opened.append([line("a")])
        opened.keep(written=True)
    with journal(path) as opened:
        assert opened.kept == {"written": True}
    path.unlink()
    with pytest.raises(ConfigError, match=r"a\.jsonl has no lines, but .*a\.jsonl\.run says that a run wrote some"):
        Journal(path, lambda line: line["path"], SETTINGS, guarded=True)
    with journal(path) as opened:  # nothing else depends on the lines: it starts anew
        assert opened.kept == {}
