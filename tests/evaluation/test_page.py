"""The page of a report: complete, escaped, and without network access."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from mplug2_fast.evaluation import ItemResult, Report
from mplug2_fast.evaluation.page import confusion, examples, render

pytest.importorskip("matplotlib", reason="the page needs the extra evaluate")
EVIL = "<script>alert('$x$')</script>&\"\udcff日本"
CLIP = "examples/moving_shapes/clips/red_square_moves_left.mp4"


def result(name: str, said: str | None, right: str = "red", value: float = 0.0, **more) -> ItemResult:
    return ItemResult(name, None, said, {right: 1.0}, {"accuracy": value}, **more)


def report(*items: ItemResult) -> Report:
    return Report(
        "question_answering", {"accuracy": 50.0}, {"items": len(items), "split": EVIL}, {}, {"x": EVIL}, [*items]
    )


class Page(HTMLParser):
    """Open tags, and attributes that load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_texts_are_escaped_and_nothing_is_loaded():
    evil = result(EVIL, EVIL, EVIL, question=EVIL)
    bad = result("bad", None, error=EVIL)
    text = render(
        report(evil, bad, ItemResult("clip", CLIP, "red", {"red": 1.0}, {"accuracy": 100.0}, frames=(1, 5, 9, 13)))
    )
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 8
    assert all(source.startswith("data:image/") for source in page.sources)
    assert sum(source.startswith("data:image/jpeg;base64,/9j/") for source in page.sources) == 4
    assert "default-src 'none'" in text
    assert text.encode("utf-8", "backslashreplace")


def test_a_report_of_retrieval_has_the_recall():
    items = [
        ItemResult(str(i), None, "a", {"a": 1.0}, {"reciprocal_rank": 50.0, "rank": rank})
        for i, rank in enumerate((1.0, 7.0, None))
    ]
    text = render(Report("retrieval", {"median_rank": 7.0}, {"items": 3}, {}, {}, items))
    assert text.count("data:image/svg+xml") == 2
    assert "Worst by reciprocal_rank" in text


def test_no_item_is_among_the_worst_and_the_best():
    items = [result(str(i), "red", value=float(i)) for i in range(5)] + [result("gone", None, error="no such file")]
    worst, best = examples(items, "accuracy")
    assert ([item.id for item in worst], [item.id for item in best]) == (["0", "1", "2"], ["4", "3"])
    worst, best = examples([result(str(i), "red", value=float(i)) for i in range(40)], "accuracy")
    assert ([item.id for item in worst][:2], [item.id for item in best][:2]) == (["0", "1"], ["39", "38"])
    assert len(worst) == len(best) == 8


def test_confusion_counts_answers():
    items = [result("1", "red"), result("2", "blue"), result("3", "green", "blue"), result("4", None, "blue")]
    found = confusion(items)
    assert found.predicted == ["red", "blue", "(other)", "(failed)"]
    assert found.rows == [
        ("red", [(1, 0.5), (1, 0.5), (0, 0.0), (0, 0.0)]),
        ("blue", [(0, 0.0), (0, 0.0), (1, 0.5), (1, 0.5)]),
    ]


def test_files_are_text_that_any_program_reads(tmp_path):
    written = report(result("a", EVIL, value=float("inf")))
    written.write(tmp_path)
    for name in ("report.json", "items.jsonl"):
        assert re.fullmatch(rb"[ -~\n]*", (tmp_path / name).read_bytes())
    read = Report.read(tmp_path)
    assert read.items[0].prediction == EVIL
    assert read.items[0].scores == {"accuracy": None}
