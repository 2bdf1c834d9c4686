"""Videos whose results are NaN or infinite: each is an error, and the rest of the batch succeeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast import bulk
from mplug2_fast.bulk.batches import Batch
from mplug2_fast.bulk.runs import steps
from mplug2_fast.outputs import GenerationOutput
from mplug2_fast.predict import predictor
from mplug2_fast.tasks.base import not_finite
from mplug2_fast.tasks.generative import texts_of
from mplug2_fast.video import Clip
from mplug2_fast.video.frames import PreparedClip

QUESTION = "what color is the circle"
VIDEOS = [bulk.Source(name, (bulk.Question(QUESTION),)) for name in ("good.mp4", "nan.mp4", "inf.mp4")]


def frames(name: str) -> torch.Tensor:
    video = torch.randn(3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    video[0, 1, 2, 3] = {"good": 1.0, "nan": torch.nan, "inf": torch.inf}[name.split(".")[0]]
    return video


@pytest.fixture(scope="module")
def captioner() -> mf.Captioner:
    return mf.Captioner(dtype="float32")


@pytest.fixture(scope="module")
def answerer() -> mf.Answerer:
    return mf.Answerer(dtype="float32")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, *_: object) -> PreparedClip:
        return PreparedClip(frames(path), [0, 1, 2, 3], (640, 360), "pyav")

    monkeypatch.setattr(predictor, "prepare_clip", load)


def assert_one_is_good(errors: list[str | None]) -> None:
    assert [error is None for error in errors] == [True, False, False]
    assert all("not finite" in error for error in errors[1:])


@pytest.mark.usefixtures("loaded")
def test_one_video_at_a_time(captioner, answerer):
    names = [video.path for video in VIDEOS]
    for results in (
        captioner.caption(names, num_return=2),
        answerer.answer(names, QUESTION),
        answerer.answer(names, QUESTION, ["red", "blue", "green"]),
    ):
        found = list(results)
        assert_one_is_good([result.error for result in found])
        assert found[0].text
        assert (found[1].text, found[1].score, found[1].alternatives) == (None, None, ())


def works(captioner: mf.Captioner, answerer: mf.Answerer, folder: Path) -> list[bulk.Work]:
    searching = captioner.generation_options(None, 1, None, None)
    generating, ranking = answerer.with_options(), answerer.with_options(["red", "blue", "green"])
    return [
        bulk.Predict(captioner, bulk.Frames(4), searching),
        *(bulk.Predict(predictor, bulk.Frames(4), options) for predictor, options in (generating, ranking)),
        *(bulk.Features(captioner, bulk.Frames(4), kind, "npy", folder) for kind in ("vision", "universal", "pooled")),
    ]


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "alone"])
def test_batches(captioner, answerer, tmp_path, number, together):
    work = works(captioner, answerer, tmp_path)[number]
    work.begin(0)
    clips = [Clip(index, video.path, frames(video.path), indices=[0, 1, 2, 3]) for index, video in enumerate(VIDEOS)]
    batches = [Batch(clips, [])] if together else [Batch([clip], []) for clip in clips]
    found = list(steps(work, VIDEOS, batches))
    lines = [step.lines[index][0] for step in found for index in sorted(step.lines)]
    assert [line["path"] for line in lines] == [video.path for video in VIDEOS]
    assert_one_is_good([line["error"] for line in lines])
    assert {index for step in found for index in step.failed} == {1, 2}
    json.dumps(lines, allow_nan=False)
    for line in lines[1:]:
        assert line.get("features") == [] if work.command == "features" else line["text"] is None


def test_a_window_that_is_not_finite_is_an_error_of_the_video(captioner):
    work = bulk.Predict(
        captioner, bulk.Frames(4, mf.video.Windows(4, 4)), captioner.generation_options(None, 1, None, None)
    )
    clips = [
        Clip(0, name, frames(name), indices=[0], window=window, last=window == 1)
        for window, name in enumerate(("good.mp4", "nan.mp4"))
    ]
    (step,) = steps(work, VIDEOS, [Batch(clips, [])])
    assert "not finite" in step.lines[0][0]["error"]
    assert step.lines[0][0]["windows"] == []


@pytest.mark.parametrize(
    ("scores", "good"),
    [
        ([-0.5, -torch.inf], True),
        ([-torch.inf, -torch.inf], False),
        ([torch.nan, -0.5], False),
        ([-0.5, torch.nan], False),
        ([torch.inf, -0.5], False),
    ],
)
def test_which_scores_are_good(captioner, scores, good):
    sequences = torch.tensor([[[101, 110, 102], [101, 111, 102]]])
    output = GenerationOutput(sequences, torch.tensor([scores]))
    (found,) = texts_of(output, captioner.tokenizer.decode, captioner.model)
    assert isinstance(found, list) == good
    if good:
        assert len(found) == 1
    else:
        assert isinstance(found, mf.NotFiniteError)


@pytest.mark.parametrize("backend", ["torch"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_beam_that_is_not_finite_shows_in_the_score(backend, bad):
    """Logits of one beam at one step in the middle of a search."""
    logits = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0))
    logits[0, 1, 7] = bad
    with mf.ops.use_backend(backend):
        scores, cumulative, *_ = mf.ops.beam_step(
            logits, torch.tensor([[-1.0, -2.0, -3.0]]), step=3, min_length=1, end_token_id=2
        )
        assert not scores[0, 0].isfinite()
        scores, *_ = mf.ops.beam_step(logits.nan_to_num(), cumulative, step=4, min_length=1, end_token_id=2)
        assert not scores[0, 0].isfinite()


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.float16, "bfloat16 or float32"), (torch.bfloat16, "float32"), (torch.float32, "checkpoint")],
)
def test_the_error_names_a_remedy(dtype, remedy):
    assert remedy in str(not_finite(dtype))
