"""The steps for Ray Data, alone and on a local Ray."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import mplug2_fast as mf
from mplug2_fast.errors import ConfigError
from mplug2_fast.ray import Answers, Captions
from tests.bulk.files import write_clip
from tests.bulk.test_run import deaths
from tests.local_ray import local_ray

__all__ = ["deaths"]  # a fixture

OPTIONS = {"num_beams": 2, "max_length": 6}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips")
    clips = [str(write_clip(folder / f"{seed}.mp4", "mpeg4", seed)) for seed in range(4)]
    return [*clips[:2], str(folder / "missing.mp4"), *clips[2:]]


def check_captions(rows: list[dict], paths: list[str]) -> None:
    by_path = {row["path"]: row for row in rows}
    assert sorted(by_path) == sorted(paths)
    for expected in mf.Captioner(device="cpu").caption(paths, **OPTIONS):
        row = by_path[expected.path]
        assert (row["text"], row["error"]) == (expected.text, expected.error)
        if expected.error is None:
            assert row["score"] == pytest.approx(expected.score, abs=1e-4)
            assert json.loads(row["alternatives"])[0]["text"] == row["text"]
            assert json.loads(row["frames"]) == [0, 1, 3, 4]
            assert (row["decoder"], list(json.loads(row["seconds"]))) == ("pyav", ["decode", "encode", "generate"])
        else:
            assert math.isnan(row["score"])
            assert (json.loads(row["alternatives"]), row["decoder"]) == ([], None)


def rows_of(columns: dict) -> list[dict]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_captions(paths: list[str]) -> None:
    step = Captions(device="cpu", **OPTIONS)
    rows = []
    for batch in (paths[:3], paths[3:], []):  # one after the other, from the same processes
        rows += rows_of(step({"path": np.array(batch, dtype=object), "more": np.arange(len(batch))}))
    assert [row["more"] for row in rows] == [0, 1, 2, 0, 1]
    check_captions(rows, paths)


def test_a_file_whose_decoder_died_is_tried_once_more(paths: list[str], deaths: dict[str, int]) -> None:
    deaths |= {paths[0]: 1, paths[1]: 2}
    rows = rows_of(Captions(device="cpu", **OPTIONS)({"path": np.array(paths[:2], dtype=object)}))
    assert [row["error"] for row in rows] == [None, "its decoder died (SIGKILL, as when memory runs out)"]


def test_answers(paths: list[str]) -> None:
    answerer = mf.Answerer(device="cpu")
    questions = ["what color is it?", "what does it do?", "what?", "what is the shape?", "what does it do?"]
    for options, choices in ((OPTIONS, None), ({}, ["red", "moves up"])):
        step = Answers(device="cpu", candidates=choices, **options)
        rows = rows_of(step({"path": np.array(paths), "question": np.array(questions)}))
        for row, path, question in zip(rows, paths, questions, strict=True):
            (expected,) = answerer.answer(path, question, choices, **options)
            assert (row["path"], row["question"], row["text"]) == (path, question, expected.text)
            assert row["error"] == expected.error
    (row,) = rows_of(Answers(device="cpu", question="what does it do?")({"path": np.array(paths[:1])}))
    (expected,) = answerer.answer(paths[0], "what does it do?")
    assert row["text"] == expected.text
    with pytest.raises(ConfigError, match="the question is empty"):
        Answers(device="cpu", question="?")({"path": np.array(paths[:1])})


@pytest.mark.parametrize("step", [Captions, Answers])
def test_layers_that_are_not_rounded(step: type[Captions | Answers]) -> None:
    loaded = step(device="cpu", dtype="int8", keep=["decoder.*"])
    assert loaded._work.predictor.model.quantisation.keep == ("decoder.*",)


def test_options_that_are_not_known() -> None:
    with pytest.raises(ConfigError, match="temperature: unknown option; use num_beams, num_return"):
        Captions(device="cpu", temperature=1)


def test_on_a_local_ray(paths: list[str]) -> None:
    pytest.importorskip("pyarrow")
    with local_ray(RAY_DATA_DISABLE_PROGRESS_BARS="1") as ray:
        videos = ray.data.from_items([{"path": path} for path in paths])
        found = videos.map_batches(
            Captions, fn_constructor_kwargs={"device": "cpu", **OPTIONS}, batch_size=2, concurrency=1
        )
        check_captions(found.take_all(), paths)
