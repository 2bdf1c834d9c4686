"""Evaluation of the tiny model on its clips, and what of it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mplug2_fast.datasets import Item
from mplug2_fast.errors import ConfigError, DataError
from mplug2_fast.evaluation import Report, evaluate
from mplug2_fast.predict import Predictor

CLIPS = Path(__file__).parents[2] / "examples/moving_shapes/clips"


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(task="question_answering", device="cpu")


@pytest.fixture(scope="module")
def questions() -> list[Item]:
    """Four questions about each of three clips, and one about a file that is not there. One answer is wrong."""
    clips = json.loads((CLIPS / "clips.json").read_text())
    items = [
        Item(f"{name} {number}", video=str(CLIPS / name), question=question, answers={answer: 1.0})
        for name, clip in sorted(clips.items())[:3]
        for number, (question, answer) in enumerate(clip["questions"].items())
    ]
    wrong = Item("wrong", video=items[0].video, question=items[0].question, answers={"purple": 0.6, "mauve": 0.4})
    return [*items, wrong, Item("gone", video=str(CLIPS / "gone.mp4"), question="what is it?", answers={"red": 1.0})]


@pytest.fixture(scope="module")
def report(predictor, questions, tmp_path_factory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("report")
    return evaluate(predictor, questions, out, checkpoint=None, split="test"), out


def test_metrics_of_questions(report, questions):
    found, _ = report
    right = len(questions) - 2
    assert found.metrics["accuracy"] == pytest.approx(100 * right / len(questions))
    assert found.failed == found.settings["failed"] == 1
    assert (found.items[-1].error, found.items[-1].prediction) == ("no such file", None)
    assert [item.scores["accuracy"] for item in found.items] == [100.0] * right + [0.0, 0.0]
    assert found.settings["split"] == "test"
    assert (found.settings["items"], found.settings["frames"], found.settings["dtype"]) == (right + 2, 4, "float32")


def test_videos_are_encoded_once(report, questions):
    lines = [json.loads(line) for line in (report[1] / "predictions.jsonl").read_text().splitlines()]
    encoded = {(line["path"], line["seconds"].get("encode")) for line in lines}
    assert len(encoded) == 4
    assert len(lines) == len(questions)


def test_a_report_is_read_as_it_was_written(report):
    found, out = report
    assert Report.read(out) == Report.read(out / "report.json") == found


def test_a_run_resumes(report, predictor, questions):
    """Nothing is predicted again; other options are refused."""
    found, out = report
    before = (out / "predictions.jsonl").read_bytes()
    more = evaluate(predictor, questions[:5], out.parent / out.name, metrics=["exact_match"], split="test")
    assert more.metrics == {"exact_match": 100.0}
    assert (out / "predictions.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match=r"num_beams=5 \(now 2\)"):
        evaluate(predictor, questions, out, options={"num_beams": 2})
    found.write(out)


def test_items_are_checked_before_anything_is_predicted(predictor):
    fine = {"video": "a.mp4", "question": "what is it?", "answers": {"red": 1.0}}
    for changed, reason in (
        ({"answers": {}}, "the item x has no answers, which question_answering needs"),
        ({"video": None, "question": ""}, "the item x has no video or image and no question, which "),
        ({"question": " . "}, "the item x: the question is empty"),
        ({"start": 1.0}, r"the item x is a part of a video \(start, end\): cut it out as a file"),
    ):
        with pytest.raises(DataError, match=reason):
            evaluate(predictor, [Item("x", **{**fine, **changed})])
    with pytest.raises(DataError, match="there are no items to evaluate"):
        evaluate(predictor, [])
