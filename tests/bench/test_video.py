"""The level `video`: ours and the official pipeline read the same from files."""

import dataclasses
import gc
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.case import OURS
from bench.row import Key, Selection
from bench.video import cases, decoding, files
from bench.video.files import BundledClips, Clips
from mplug2_fast.video import load_video

pytest.importorskip("av")

QUICK = Selection("tiny", ("float32",), quick=True)


@pytest.fixture
def small(monkeypatch):
    """Measures two small files instead."""
    monkeypatch.setattr(cases, "DECODING", {"2 small files": (partial(Clips, 2, 5, 32), True)})


@pytest.fixture
def without_av(monkeypatch):
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)


def names(selection):
    return [f"{key.name}: {key.sizes}, {key.dtype}" for key in cases.keys(selection)]


def test_keys():
    assert names(QUICK) == ["decoding: tiny, 120 frames of 256 px, float32"]
    assert names(Selection("base", ("bfloat16",), quick=True)) == []
    assert len(names(Selection("base", ("float32", "bfloat16")))) == 3 + 2 * 2
    assert [key.name for key in cases.keys(dataclasses.replace(QUICK, device="cuda", quick=False))] == [
        "captioning files",
        "captioning files",
    ]
    assert names(dataclasses.replace(QUICK, only=("decoding",))) == ["decoding: tiny, 120 frames of 256 px, float32"]
    assert names(dataclasses.replace(QUICK, directions=("backward",))) == []


def test_each_key_has_files():
    for key in cases.keys(Selection("base", ("float32",))):
        kind = cases.DECODING if key.name == "decoding" else cases.CAPTIONING
        assert key.sizes.split(", ", 1)[1] in kind


def test_a_note_without_av(without_av):
    assert names(QUICK) == []
    assert cases.notes() == ["level video is skipped: PyAV is not installed: pip install av"]
    with pytest.raises(ImportError, match="pip install av"):
        cases.build(Key("video", "decoding", "tiny, 16 frames of 256 px", "forward", "float32", "cpu"), compile=False)


def test_files_are_deleted_with_their_object():
    clips = Clips(1, 3, 16)
    folder = Path(clips.paths[0]).parent
    assert folder.exists()
    del clips
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize(("frames", "size"), [(1, 16), (5, 34), (40, 20)])
def test_official_decoding_gives_the_same_pixels(frames, size):
    (path,) = (clips := Clips(1, frames, size)).paths
    ours, reference = (load(path, num_frames=4, image_size=14) for load in (load_video, decoding.reference))
    assert reference.shape == (3, 4, 14, 14)
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)
    del clips


def test_decoding(small):
    (key,) = (key for key in cases.keys(QUICK) if key.name == "decoding")
    case = cases.build(key, compile=True)
    ways = {name: way() for name, way in case.ways.items()}
    assert {name: len(calls) for name, calls in ways.items()} == {OURS: 2, "reference": 2}
    assert ways[OURS][1]().shape == ways["reference"][1]().shape == (3, 4, 32, 32)
    found = case.agreement()
    assert found.ours <= found.allowed == decoding.FLOOR


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captioning(dtype):
    key = Key("video", "captioning files", "tiny, 6 clips of 128 px", "forward", dtype, "cpu")
    case = cases.build(key, compile=True)
    assert list(case.ways) == [OURS, "reference", "eager"]
    (call,) = case.ways[OURS]()
    assert call()[:2] == ["a blue circle grows", "a green circle moves up"]
    found = case.agreement()
    assert (found.ours, found.allowed, found.baselines) == (0.0, 0.0, {"reference": 0.0, "eager": 0.0})
    assert case.flop > 10**8
    assert case.backend.startswith("pyav, ")


def test_a_different_caption_is_an_error(monkeypatch):
    one = BundledClips()
    one.paths = one.paths[:1]
    monkeypatch.setattr(cases, "CAPTIONING", {"1 clip": (lambda: one, True)})
    case = cases.build(Key("video", "captioning files", "tiny, 1 clip", "forward", "float32", "cpu"), compile=False)
    monkeypatch.setattr(decoding, "_pixels", lambda frame, size: torch.zeros(3, size, size))
    found = case.agreement()
    assert found.ours == float("inf") > found.allowed
