"""Items and their JSON Lines files."""

import json

import pytest

from mplug2_fast.datasets import Item, read_items, write_items
from mplug2_fast.errors import DataError

LINES = [
    {"id": "a", "video": "a.mp4", "start": 1.0, "end": 2.5, "caption": "one"},
    {"id": "b", "image": "b.jpg", "caption": ["one", "two"], "split": "val"},
    {"id": "c", "video": "c.mp4", "question": "who?", "answer": "man"},
    {"id": "d", "image": "d.jpg", "question": "who?", "answers": {"man": 0.75, "boy": 0.25}},
    {"id": "e", "image": "e.jpg", "question": "who?", "answers": {"man": 0.5}},
    {"id": "f", "image": "f.jpg", "text": "the cat", "box": [0.5, 0.5, 1.0, 0.25]},
    {"id": "g", "images": ["g.png", "h.png"], "text": "two cats", "label": False},
    {"id": "h", "text": "x", "text_pair": "y", "label": 4.5, "task": "glue"},
    {"id": "i", "text": "x", "label": 0, "source": {"any": ["thing"]}},
]


@pytest.mark.parametrize("line", LINES, ids=[line["id"] for line in LINES])
def test_an_item_is_written_as_it_was_read(line):
    assert Item.from_json(line).to_json() == line


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"answers": ["man", "boy", "man", "man"]}, "answers", {"man": 0.75, "boy": 0.25}),
        ({"answers": {"man": 1}}, "answers", {"man": 1.0}),
        ({"answer": "man"}, "answers", {"man": 1.0}),
        ({"caption": "one"}, "caption", ("one",)),
        ({"id": 7}, "id", "7"),
        ({"end": None, "label": None}, "end", None),
        ({"video": "a.mp4", "video_id": 3}, "extra", {"video_id": 3}),
        ({"video": "a.mp4", "images": ["b.jpg"]}, "media", ("a.mp4", "b.jpg")),
    ],
)
def test_fields_have_one_form(given, field, value):
    assert getattr(Item.from_json({"id": "a", **given}), field) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vidoe": "a.mp4"}, "unknown field 'vidoe': did you mean 'video'?"),
        ({"video_id": "a"}, "unknown field 'video_id': did you mean 'video'?"),
        ({"id": True}, "id must be a text or a whole number, got True"),
        ({"id": ""}, "id must be a text or a whole number, got ''"),
        ({"video": 3}, "video must be a text, got 3"),
        ({"caption": "\ud800"}, "caption has half characters, which no file can hold: '\\ud800'"),
        ({"caption": ["a", 3]}, "caption must be a text, got 3"),
        ({"start": -1}, "start must be a number of at least 0, got -1"),
        ({"start": 2, "end": 2}, "end must be after start, got start 2 and end 2"),
        ({"answer": "a", "answers": ["a"]}, "has both answer and answers: keep one of them"),
        ({"answers": []}, "answers must be an object of answer and weight, or a list, got []"),
        ({"answers": ["a", 1]}, "answers must be a text, got 1"),
        ({"answers": {"a": -1}}, "the weight of 'a' must be a number of at least 0, got -1"),
        ({"answers": {"a": 0}}, "answers: the weights are all 0"),
        ({"box": [0.5, 0.5, 1.1, 0.1]}, "box must be [center x, center y, width, height], each from 0 to 1"),
        ({"box": [0.5, 0.5, 0, 0.1]}, "box must be [center x, center y, width, height], each from 0 to 1"),
        ({"box": 0.5}, "box must be [center x, center y, width, height], each from 0 to 1"),
        ({"label": ["a"]}, "label must be a text, a number or a truth value, got ['a']"),
    ],
    ids=str,
)
def test_values_that_make_no_sense(given, message):
    with pytest.raises(DataError) as caught:
        Item.from_json({"id": "a", **given})
    assert str(caught.value).startswith(message)


def test_files_of_splits(tmp_path):
    items = [Item.from_json(line) for line in LINES]
    assert write_items(tmp_path / "new/train.jsonl", items) == len(items)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["train.jsonl"]
    found = read_items(tmp_path / "new", "train")
    assert [item.id for item in found] == [line["id"] for line in LINES if line["id"] != "b"]  # b is of val
    assert found[0].video == str(tmp_path / "new/a.mp4")
    assert found[5].images == (str(tmp_path / "new/g.png"), str(tmp_path / "new/h.png"))
    assert [item.id for item in read_items(tmp_path / "new/train.jsonl")] == [line["id"] for line in LINES]
    for folder, split, message in (
        ("new", None, "new is a folder: name a split (train), or one of its .jsonl files"),
        ("new", "test", "new has no split 'test'; it has train"),
        ("old", None, "old: no such file or folder"),
    ):
        with pytest.raises(DataError) as caught:
            read_items(tmp_path / folder, split)
        assert str(caught.value) == f"{tmp_path}/{message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": }\n', ":2: not JSON: "),
        (b'{"label": NaN}', ":1: not JSON: NaN is not a number"),
        (b"[1]\n", ':1: must be a JSON object such as {"video": "a.mp4"}, got list'),
        (b'{"id": 1}\n\n{"id": "1"}\n', ":3: the id '1' is also on line 1: make ids unique"),
        (b'{"box": 1}\n', ":1: box must be"),
        (b"\xff\n", ": not UTF-8 text: "),
        (b"\n", ": no items"),
    ],
)
def test_errors_name_file_and_line(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_items(tmp_path / "a.jsonl")
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}{message}")


def test_lines_without_an_id_have_their_number(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "\ufeff" + "\n".join(json.dumps({"text": text}) for text in "ab"), encoding="utf-8"
    )
    assert [item.id for item in read_items(tmp_path / "a.jsonl")] == ["1", "2"]


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/a\.jsonl: cannot be written: "):
        write_items(tmp_path / "file/a.jsonl", [])
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be written: an item has '\\ud800'"):
        write_items(tmp_path / "a.jsonl", [Item(id="a", extra={"note": "\ud800"})])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
