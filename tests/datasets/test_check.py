"""The findings of `check`, and the command line for data sets."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mplug2_fast.cli import app
from mplug2_fast.datasets.check import WARNINGS, check
from mplug2_fast.datasets.media import same_contents
from mplug2_fast.errors import DataError

CLIPS = Path(__file__).parents[2] / "examples/moving_shapes/clips"
LONG_QUESTION = " ".join(["why"] * 51)


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def bad(tmp_path, monkeypatch):
    """A data set with one finding of each kind, at the least."""
    monkeypatch.chdir(tmp_path)
    clip = (CLIPS / "blue_circle_grows.mp4").read_bytes()
    other = (CLIPS / "green_star_shrinks.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(clip)
    (tmp_path / "cut.mp4").write_bytes(clip[:3000])
    for name in ("b", "c", "copy"):
        (tmp_path / f"{name}.mp4").write_bytes(other)
    (tmp_path / "text.mp4").write_text("This is not a video.")
    write(
        tmp_path / "train.jsonl",
        {"id": "1a", "video": "a.mp4", "start": 0, "end": 2, "caption": "A circle."},
        {"id": "1a", "video": "b.mp4", "caption": [" ...", "a star"], "label": "star"},
        {"id": "2a", "video": "c.mp4", "question": LONG_QUESTION, "answer": "so"},
        {"id": "3a", "video": "cut.mp4", "caption": "x" * 600},
        {"id": "4a", "video": "none.mp4", "text": "one", "box": [0.1, 0.5, 0.5, 0.5]},
        {"id": "5a", "video": "a.mp4", "start": 0, "end": 2, "caption": "a CIRCLE"},
        {"id": "6a", "video": "text.mp4"},
        {"id": "7a", "text": "The same text"},
        '{"id": "8a", "vidoe": "a.mp4"}\n',
        {"id": "9a", "label": "star"},
    )
    write(
        tmp_path / "test.jsonl",
        {"id": "1a", "video": "copy.mp4", "caption": "a star"},
        {"video": "a.mp4", "start": 1, "end": 3, "caption": "a circle"},
        {"video": "./a.mp4", "start": 2, "end": 3, "caption": "a circle"},
        {"text": "the same text!", "label": "dot"},
        {"image": "c.mp4", "question": "why?", "answer": "no"},
    )
    return tmp_path


FOUND = {
    ("bad line", "train.jsonl:9", "unknown field 'vidoe': did you mean 'video'?"),
    ("repeated id", "train.jsonl:2", "the id '1a' is also on line 1"),
    ("repeated item", "train.jsonl:6", "has the same input and texts as line 1"),
    ("repeated file", "train.jsonl:3", "c.mp4 has the same contents as b.mp4, at train.jsonl:2"),
    ("empty text", "train.jsonl:2", "the caption ' ...' has no words"),
    ("long text", "train.jsonl:3", "the question has 51 words; only the first 50 are read"),
    ("no target", "train.jsonl:7", "has no caption, answer, label or box to learn"),
    ("no input", "train.jsonl:10", "has no video, image, images or text"),
    ("box", "train.jsonl:5", "the box [0.1, 0.5, 0.5, 0.5] is partly outside of the image"),
    ("unreadable file", "train.jsonl:4", "cut.mp4: is truncated: it has 3,000 bytes of at least 4,524"),
    (
        "unreadable file",
        "train.jsonl:7",
        "text.mp4: is not a video or image that can be read (Invalid data found when processing input)",
    ),
    ("missing file", "train.jsonl:5", "none.mp4: no such file"),
    ("unseen label", "test.jsonl:4", "the label 'dot' of 1 item is not in training"),
    ("id in two splits", "test.jsonl:1", "the id '1a' is also at train.jsonl:1, in training"),
    ("leak", "test.jsonl:1", "copy.mp4 has the same contents as b.mp4, at train.jsonl:2, in training"),
    ("leak", "test.jsonl:2", "a.mp4 is also at train.jsonl:1, in training"),
    ("leak", "test.jsonl:4", "the same text is at train.jsonl:8, in training"),
    ("leak", "test.jsonl:5", "c.mp4 is also at train.jsonl:3, in training"),
}


@pytest.mark.parametrize("decode", [True, False])
def test_everything_that_is_wrong_is_found_once(bad, decode):
    seen = []
    found = check(".", decode=decode, num_workers=1, progress=lambda *counts: seen.append(counts))
    assert {(each.kind, each.place, each.message) for each in found.findings} == FOUND
    assert sum(found.counts.values()) == len(FOUND)
    assert {each.kind for each in found.findings} - {each.kind for each in found.errors} == WARNINGS
    assert seen == [(n, 7) for n in range(1, 8)]


def test_splits_are_summarised(bad):
    splits = check(".", decode=False).splits
    train, test = splits["train"], splits["test"]
    assert (train.items, train.files, train.captions, train.questions) == (9, 6, 5, 1)
    assert (train.labels, train.unseen_answers) == ({"star": 2}, 0)
    assert (test.items, test.files, test.unseen_answers) == (5, 3, 1)


def test_texts_may_have_as_many_tokens_as_the_model_reads(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "cat " * 510, "label": "a"}, {"text": "cat " * 511, "label": "b"})
    (finding,) = check(tmp_path).findings
    assert (finding.kind, finding.message) == ("long text", "the text has 513 tokens, more than 512")


def test_one_file_may_hold_all_splits(bad):
    write(
        bad / "all.jsonl",
        {"id": "a", "video": "a.mp4", "caption": "x", "split": "train"},
        {"id": "a", "video": "a.mp4", "caption": "y", "split": "test"},
    )
    assert check("all.jsonl", decode=False).counts == {"leak": 1, "id in two splits": 1}
    assert check("all.jsonl", "test", decode=False).counts == {}
    with pytest.raises(DataError, match=r"all\.jsonl: no items of the split 'val'"):
        check("all.jsonl", "val")
    (bad / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no \.jsonl files in this folder"):
        check("empty")


def test_same_contents_differ_in_no_byte(tmp_path):
    contents = {"a": b"x" * 300_000, "b": b"x" * 300_000, "c": b"x" * 150_000 + b"y" + b"x" * 149_999, "d": b"x"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in "abcde"]
    assert same_contents(paths) == [paths[:2]]


def run(*arguments):
    done = CliRunner().invoke(app, ["data", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_prints_some_findings_of_each_kind(bad):
    code, out, err = run("check", ".", "--fast")
    assert (code, err) == (2, "error: .: 14 errors, 4 warnings\n")
    assert "error: unreadable file: 2\n  train.jsonl:4: cut.mp4: is truncated" in out
    assert out.count("...") == 2  # one is of a caption
    assert "... and 1 more: --all shows them" in out
    assert "more: --all" not in run("check", ".", "--fast", "--all")[1]
    code, out, _ = run("check", ".", "--fast", "--json")
    assert code == 2
    assert json.loads(out)["counts"] == check(".", decode=False).counts


def test_a_good_data_set_has_status_0(bad):
    write(bad / "good.jsonl", *({"video": f"{name}.mp4", "end": n, "label": name} for n, name in enumerate("aab", 1)))
    code, out, err = run("check", "good.jsonl", "--fast")
    assert (code, err) == (0, "")
    assert "2 (most: a, 66.7% of the items; least: b, 1 item)" in out
    assert out.endswith("no problems found\n")


def test_convert_then_show(tmp_path):
    (tmp_path / "snli_ve_test.jsonl").write_text(
        json.dumps({"Flickr30K_ID": "7", "sentence2": "A " + "long " * 20, "gold_label": "neutral", "pairID": "p"})
        + "\n"
        + json.dumps({"Flickr30K_ID": "8", "sentence2": "None.", "gold_label": "-", "pairID": "q"})
    )
    out = tmp_path / "out"
    code, printed, err = run("convert", "snli-ve", str(tmp_path), "--out", str(out), "--media", str(tmp_path))
    assert (code, printed) == (0, f"{out}/test.jsonl\t1 item\n")
    assert err == (
        f"note: left out 1 pairs without a gold label\nnote: 1 of 1 media files are not in {tmp_path}, such as 7.jpg\n"
    )
    code, printed, err = run("show", f"{out}/test.jsonl")
    assert (code, err) == (0, "")
    header, row = printed.splitlines()
    assert header.split() == ["id", "image", "text", "label"]
    assert row.split("  ")[-2:] == ["A long long long long long long long long long long long ...", "neutral"]
    assert json.loads(run("show", f"{out}/test.jsonl", "--id", "p", "--json")[1])["label"] == "neutral"
    code, printed, err = run("show", f"{out}/test.jsonl", "--id", "q")
    assert (code, printed, err) == (2, "", f"error: {out}/test.jsonl: no item has the id 'q'\n")


def test_list_names_every_data_set_and_what_it_needs():
    from mplug2_fast.datasets.converters import CONVERTERS

    code, out, _ = run("list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(CONVERTERS)
    assert "refs(*).p, instances.json" in out
    assert "train 7,010 (train and val together), test 2,990 videos" in run("list", "msrvtt-qa")[1]
    code, _, err = run("list", "msrvt-qa")
    assert (code, err) == (
        2,
        "error: unknown data set 'msrvt-qa': did you mean 'msrvtt-qa'? `mplug2-fast data list` shows all\n",
    )
