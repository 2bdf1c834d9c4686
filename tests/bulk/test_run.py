"""Bulk runs in this process: their results, bad files, and second runs."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast import bulk
from mplug2_fast.bulk import features, runs
from mplug2_fast.bulk.journal import write_whole
from mplug2_fast.errors import BackendError, ConfigError, MPlug2Error, VideoError
from mplug2_fast.video import Clip, DecodePool, Windows, load_video
from mplug2_fast.video.backends import reason_not_available
from tests.bulk.files import mixed_files, write_clip

OPTIONS = {"num_beams": 2, "num_return": 2, "min_length": 1, "max_length": 6}
FRAMES = bulk.Frames(4)
WINDOWS = bulk.Frames(4, Windows(4, 3))


@pytest.fixture(scope="module")
def captioner() -> mf.Captioner:
    return mf.Captioner(device="cpu")


@pytest.fixture(scope="module")
def answerer() -> mf.Answerer:
    return mf.Answerer(device="cpu")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips")
    formats = (("mp4", "libx264", 6), ("avi", "mpeg4", 13), ("mkv", "mjpeg", 4), ("gif", "gif", 3), ("mp4", "mpeg4", 8))
    return [
        str(write_clip(folder / f"{seed}.{extension}", codec, seed, frames))
        for seed, (extension, codec, frames) in enumerate(formats)
    ]


def videos(paths: Iterable[str]) -> list[bulk.Source]:
    return bulk.find_videos(paths).videos


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(path: Path) -> list[dict]:
    found = [{name: value for name, value in line.items() if name != "seconds"} for line in lines(path)]
    return sorted(found, key=json.dumps)


def budget(work: bulk.Work, clips: int) -> int:
    return clips * work.bytes_of_clip()


def approximately(alternatives: Iterable[tuple[str, float]]) -> list[dict]:
    return [{"text": text, "score": pytest.approx(score, abs=1e-4)} for text, score in alternatives]


# --- captions and answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_captions_are_those_of_one_file_at_a_time(
    captioner: mf.Captioner, clips: list[str], tmp_path: Path, batch: int
) -> None:
    work = bulk.Predict(captioner, FRAMES, OPTIONS)
    out = tmp_path / "a.jsonl"
    missing = str(tmp_path / "missing.mp4")
    paths = [*clips[:2], missing, *clips[2:]]
    summary = bulk.run(work, videos(paths), out, batch_memory=budget(work, batch))
    assert (summary.lines, summary.failed, summary.videos) == (6, 1, 6)
    assert 0 < summary.model_seconds < summary.seconds
    found = {line["path"]: line for line in lines(out)}
    assert list(found) == paths
    for expected in captioner.caption(clips, **OPTIONS):
        line = found[expected.path]
        assert list(line) == ["path", "text", "score", "alternatives", "frames", "decoder", "seconds", "error"]
        assert line["alternatives"] == approximately(expected.alternatives)
        assert {"text": line["text"], "score": line["score"]} == line["alternatives"][0]
        assert (line["decoder"], line["error"]) == ("pyav", None)
        assert list(line["seconds"]) == ["decode", "encode", "generate"]
        assert min(line["seconds"].values()) > 0
    assert found[clips[0]]["frames"] == [0, 1, 3, 4]
    assert list(found[missing]) == list(found[clips[0]])
    assert (found[missing]["text"], found[missing]["alternatives"], found[missing]["frames"]) == (None, [], [])
    assert found[missing]["error"] == "no such file"


def test_windows_are_captioned_one_by_one(captioner: mf.Captioner, clips: list[str], tmp_path: Path) -> None:
    work = bulk.Predict(captioner, WINDOWS, OPTIONS)
    broken = tmp_path / "broken.mp4"
    broken.touch()
    bulk.run(work, videos([*clips, str(broken)]), tmp_path / "a.jsonl", batch_memory=budget(work, 2))
    found = {line["path"]: line for line in lines(tmp_path / "a.jsonl")}
    assert found[clips[1]]["frames"] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [9, 10, 11, 12]]
    assert found[clips[3]]["frames"] == [[0, 1, 2, 2]]
    assert list(found[clips[0]]) == ["path", "windows", "frames", "decoder", "seconds", "error"]
    assert (found[str(broken)]["windows"], found[str(broken)]["error"]) == ([], "is empty")
    with DecodePool(1, image_size=32, windows=Windows(4, 3)) as pool:
        respond = captioner.responder(**OPTIONS)
        for clip in pool.clips(clips):
            expected, _ = captioner.say(captioner.encode(clip.frames[None])[0], lambda embeds: respond(embeds, [None]))
            window = found[clip.source]["windows"][clip.window]
            assert window["alternatives"] == approximately(expected[0])
            assert window["text"] == window["alternatives"][0]["text"]
            assert len(found[clip.source]["windows"]) == len(found[clip.source]["frames"])


@pytest.mark.parametrize("candidates", [None, ["red", "moves left", "a square"]])
def test_answers_are_those_of_one_file_at_a_time(
    answerer: mf.Answerer, clips: list[str], tmp_path: Path, candidates: list[str] | None
) -> None:
    asked = [
        {"path": clips[0], "question": "what color is the shape?", "id": 7},
        {"path": clips[1], "question": "what does it do?"},
        {"path": clips[0], "question": "what is the shape that moves left?", "id": "x"},
        {"path": str(tmp_path / "none.mp4"), "question": "what?"},
        {"path": clips[0], "question": "what does it do?"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in asked))
    options = {"num_return": 2} if candidates else OPTIONS
    predictor, filled = answerer.with_options(candidates, **options)
    work = bulk.Predict(predictor, FRAMES, filled)
    sources = bulk.read_questions(tmp_path / "q.jsonl").videos
    summary = bulk.run(work, sources, tmp_path / "a.jsonl", batch_memory=budget(work, 2))
    assert (summary.lines, summary.failed) == (5, 1)
    found = lines(tmp_path / "a.jsonl")
    heads = [{name: line[name] for name in ("path", "question", "id") if name in line} for line in found]
    assert sorted(heads, key=json.dumps) == sorted(asked, key=json.dumps)
    for line in found:
        if line["error"] is None:
            (expected,) = answerer.answer(line["path"], line["question"], candidates, **options)
            assert line["alternatives"] == approximately(expected.alternatives)
    assert [line["error"] for line in found if "none" in line["path"]] == ["no such file"]


@pytest.mark.parametrize("backend", ["torchcodec", "dali"])
def test_other_decoders(captioner: mf.Captioner, tmp_path: Path, backend: str) -> None:
    paths = [str(write_clip(tmp_path / f"{seed}.webm", "libvpx-vp9", seed)) for seed in range(3)]
    work = bulk.Predict(captioner, FRAMES, OPTIONS)
    decoding = bulk.Decoding(backend=backend)
    if reason := reason_not_available(backend):
        with pytest.raises(BackendError, match=re.escape(reason)):
            bulk.run(work, videos(paths), tmp_path / "a.jsonl", decoding=decoding)
        return
    bulk.run(work, videos(paths), tmp_path / "a.jsonl", decoding=decoding)
    assert {line["decoder"] for line in lines(tmp_path / "a.jsonl")} == {backend}
    assert [line["path"] for line in lines(tmp_path / "a.jsonl")] == paths
    with pytest.raises(ConfigError, match=rf"decoder='{backend}' \(now 'pyav'\)"):
        bulk.run(work, videos(paths), tmp_path / "a.jsonl")


def test_dali_decodes_no_windows(captioner: mf.Captioner, clips: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="DALI does not decode windows"):
        bulk.run(
            bulk.Predict(captioner, WINDOWS, OPTIONS),
            videos(clips),
            tmp_path / "a.jsonl",
            decoding=bulk.Decoding(backend="dali"),
        )


# --- broken, hanging, dying -------------------------------------------------------------------------------------------


class Disturbed(DecodePool):
    """A signal reaches the worker after its first clip, while it decodes a later file or waits."""

    signal = signal.SIGKILL

    def clips(self, sources: Iterable[str]) -> Iterator[Clip]:
        for clip in super().clips(sources):
            if type(self).signal is not None:
                os.kill(self.pids[0], type(self).signal)
                type(self).signal = None  # once
            yield clip


@pytest.mark.parametrize("name", ["SIGSTOP", "SIGSEGV", "SIGKILL"])
def test_a_worker_that_hangs_or_dies_costs_no_file(
    captioner: mf.Captioner, clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pool = type("Pool", (Disturbed,), {"signal": getattr(signal, name)})
    monkeypatch.setattr(runs, "DecodePool", pool)
    work = bulk.Predict(captioner, FRAMES, OPTIONS)
    summary = bulk.run(work, videos(clips), tmp_path / "a.jsonl", decoding=bulk.Decoding(1, timeout=1.0))
    assert (summary.lines, summary.failed) == (5, 0)
    assert sorted(line["path"] for line in lines(tmp_path / "a.jsonl")) == sorted(clips)


class Unlucky(DecodePool):
    """A decoder that dies on some files a given number of times, and records the pools and their files."""

    deaths: ClassVar[dict[str, int]]
    pools: ClassVar[list[tuple[int, list[str]]]]

    def clips(self, sources: Iterable[str]) -> Iterator[Clip]:
        drawn: list[str] = []
        dead: set[str] = set()
        self.pools.append((self._ahead, drawn))

        def drawing() -> Iterator[str]:
            for source in sources:
                drawn.append(source)
                yield source

        for clip in super().clips(drawing()):
            if clip.source in dead:
                continue
            if self.deaths.get(clip.source, 0) > 0:
                self.deaths[clip.source] -= 1
                dead.add(clip.source)
                error = VideoError(f"{clip.source}: its decoder died (SIGKILL, as when memory runs out)")
                clip = Clip(clip.index, clip.source, error=error, transient=True)
            yield clip


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    Unlucky.deaths, Unlucky.pools = {}, []
    monkeypatch.setattr(runs, "DecodePool", Unlucky)
    return Unlucky.deaths


@pytest.mark.parametrize("frames", [FRAMES, WINDOWS])
def test_what_may_have_been_bad_luck_is_tried_once_more_alone_after_the_others(
    captioner: mf.Captioner, clips: list[str], tmp_path: Path, deaths: dict[str, int], frames: bulk.Frames
) -> None:
    missing = str(tmp_path / "missing.mp4")
    work = bulk.Predict(captioner, frames, OPTIONS)
    bulk.run(work, videos([*clips, missing]), tmp_path / "whole.jsonl", batch_memory=budget(work, 1))
    Unlucky.pools.clear()
    deaths |= {clips[0]: 1, clips[2]: 5}
    out = tmp_path / "a.jsonl"
    counted = []

    def started(plan: bulk.Plan) -> object:
        return lambda videos, failed: counted.append((videos, failed))

    decoding = bulk.Decoding(2, timeout=30.0)
    summary = bulk.run(
        work, videos([*clips, missing]), out, batch_memory=budget(work, 1), decoding=decoding, started=started
    )
    assert (summary.lines, summary.failed, summary.videos) == (6, 2, 6)
    assert [sum(column) for column in zip(*counted, strict=True)] == [6, 2]
    assert Unlucky.pools == [(2 * runs.PREFETCH, [*clips, missing]), (1, [clips[0], clips[2]])]
    whole, found = ({line["path"]: line for line in without_seconds(path)} for path in (tmp_path / "whole.jsonl", out))
    assert len(lines(out)) == len(found) == 6
    assert [line["path"] for line in lines(out)][-2:] == [clips[0], clips[2]]
    assert found.pop(clips[2]) == {
        **{name: value for name, value in whole.pop(clips[2]).items() if name in ("path",)},
        **{name: value for name, value in whole[missing].items() if name != "path"},
        "error": "its decoder died (SIGKILL, as when memory runs out)",
        "transient": True,
    }
    assert found == whole  # also that of the first, which is computed alone as it was in its batch
    assert "transient" not in found[missing]

    again = bulk.run(work, videos([*clips, missing]), out)
    assert (again.videos, again.failed) == (0, 2)  # finished, unless it is asked for


def test_failed_files_are_done_again_when_that_is_asked_for(
    captioner: mf.Captioner, clips: list[str], tmp_path: Path, deaths: dict[str, int]
) -> None:
    work = bulk.Predict(captioner, FRAMES, OPTIONS)
    late, out, other = tmp_path / "late.mp4", tmp_path / "a.jsonl", str(tmp_path / "other.mp4")
    deaths[clips[1]] = 2
    first = bulk.run(work, videos([*clips, str(late), other]), out, batch_memory=budget(work, 2))
    assert (first.lines, first.failed) == (7, 3)
    out.chmod(0o640)
    before = lines(out)
    late.write_bytes(Path(clips[4]).read_bytes())
    paths = [*clips, str(late)]  # without the other: its line stays
    again = bulk.run(work, videos(paths), out, batch_memory=budget(work, 2), retry_failed=True)
    assert (again.lines, again.failed, again.videos) == (6, 0, 2)
    assert sorted(line["path"] for line in lines(out)) == sorted([*paths, other])
    assert [line for line in before if not line["error"] or line["path"] == other] == lines(out)[:5]
    assert out.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.glob("a.jsonl*")) == ["a.jsonl", "a.jsonl.run"]
    unchanged = out.read_bytes()
    bulk.run(work, videos(paths), out, retry_failed=True)
    assert out.read_bytes() == unchanged


@pytest.mark.filterwarnings("ignore:.*too large for cpu")
def test_a_batch_that_is_too_large_goes_in_halves(
    captioner: mf.Captioner, clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = bulk.Predict.compute

    def at_most_two(work: bulk.Predict, frames: torch.Tensor, sources: list[bulk.Source]) -> object:
        if len(frames) > 2:
            raise torch.OutOfMemoryError
        return computed(work, frames, sources)

    work = bulk.Predict(captioner, FRAMES, OPTIONS)
    bulk.run(work, videos(clips), tmp_path / "whole.jsonl")
    monkeypatch.setattr(bulk.Predict, "compute", at_most_two)
    with pytest.warns(UserWarning, match="a batch of 5 clips is too large for cpu"):
        bulk.run(work, videos(clips), tmp_path / "halves.jsonl")
    halves, whole = lines(tmp_path / "halves.jsonl"), lines(tmp_path / "whole.jsonl")
    assert [(line["path"], line["text"]) for line in halves] == [(line["path"], line["text"]) for line in whole]

    def never(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bulk.Predict, "compute", never)
    with (
        pytest.warns(UserWarning, match="too large"),
        pytest.raises(MPlug2Error, match="cpu ran out of memory for one clip"),
    ):
        bulk.run(work, videos(clips), tmp_path / "none.jsonl")


# --- again ------------------------------------------------------------------------------------------------------------


def test_a_second_run_does_what_is_left(captioner: mf.Captioner, clips: list[str], tmp_path: Path) -> None:
    work = bulk.Predict(captioner, FRAMES, OPTIONS)
    out, whole = tmp_path / "a.jsonl", tmp_path / "whole.jsonl"
    bulk.run(work, videos(clips), whole, batch_memory=budget(work, 2))
    calls = []

    def started(plan: bulk.Plan) -> object:
        calls.append((plan.left, plan.finished))
        return lambda videos, failed: calls.append(videos)

    bulk.run(work, videos(clips[:2]), out, batch_memory=budget(work, 2), started=started)
    bulk.run(work, videos(clips), out, batch_memory=budget(work, 2), started=started)
    assert calls == [(2, 0), 2, (3, 2), 2, 1]
    assert without_seconds(out) == without_seconds(whole)
    before = out.read_bytes()
    summary = bulk.run(work, videos(clips), out, started=started)
    assert (summary.lines, summary.videos, calls[-1]) == (5, 0, (0, 5))
    assert out.read_bytes() == before


def test_a_run_with_another_model_or_other_options_is_refused(
    captioner: mf.Captioner, clips: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "a.jsonl"
    bulk.run(bulk.Predict(captioner, FRAMES, OPTIONS), videos(clips[:1]), out)
    other = mf.MPlug2ForCaptioning(captioner.model.config)
    others = {
        "model=": bulk.Predict(mf.Captioner(other, captioner.tokenizer), FRAMES, OPTIONS),
        r"num_beams=2 \(now 3\)": bulk.Predict(captioner, FRAMES, {**OPTIONS, "num_beams": 3}),
        r"frames=4 \(now 5\)": bulk.Predict(captioner, bulk.Frames(5), OPTIONS),
        r"frames=4 \(now None\), windows=None \(now \[4, 3\]\)": bulk.Predict(captioner, WINDOWS, OPTIONS),
        r"command='caption' \(now 'features'\)": bulk.Features(captioner, FRAMES, "pooled", "npy", tmp_path),
    }
    for message, work in others.items():
        with pytest.raises(ConfigError, match=message):
            bulk.run(work, videos(clips), out)
    assert len(lines(out)) == 1


def test_the_batch_size_stays_unless_it_is_asked_for(
    captioner: mf.Captioner, clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = bulk.Predict(captioner, FRAMES, OPTIONS)
    sizes = []

    def started(plan: bulk.Plan) -> object:
        sizes.append(plan.batch_size)
        return lambda videos, failed: None

    out = tmp_path / "a.jsonl"
    for memory in (3, 1000, None):  # as if there were less or more every time
        monkeypatch.setattr("mplug2_fast.bulk.memory.available_memory", lambda: 40 * work.bytes_of_clip())
        size = None if memory is None else budget(work, memory)
        bulk.run(work, videos(clips[: 1 + len(sizes)]), out, batch_memory=size, started=started)
    assert sizes == [3, 16, 3]


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vision", "universal", "pooled"])
@pytest.mark.parametrize("format", ["safetensors", "npy"])
def test_features_are_those_of_the_model(
    captioner: mf.Captioner, clips: list[str], tmp_path: Path, kind: str, format: str
) -> None:
    work = bulk.Features(captioner, FRAMES, kind, format, tmp_path)
    paths = [*clips, str(tmp_path / "none.mp4")]
    bulk.run(work, videos(paths), tmp_path / "index.jsonl", batch_memory=budget(work, 2))
    assert {path.name for path in tmp_path.iterdir()} == {
        f"features-0000-000000.{format}",
        "index.jsonl",
        "index.jsonl.run",
    }
    found = dict(bulk.read_features(tmp_path))
    assert list(found) == clips
    for path, rows in found.items():
        video = load_video(path, num_frames=4, image_size=32)[None]
        with torch.inference_mode():
            model = captioner.model
            expected = model.visual(video) if kind == "vision" else model.encode_video(video)
        expected = expected[:, 0] if kind == "pooled" else expected
        assert rows.shape == expected.shape
        assert torch.allclose(rows, expected, atol=1e-4)
    error = lines(tmp_path / "index.jsonl")[-1]
    assert (error["features"], error["error"]) == ([], "no such file")


def test_features_of_windows_are_rows_of_one_video(
    captioner: mf.Captioner, clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features.Shards, "is_due", lambda shards: len(shards._rows) >= 3)
    work = bulk.Features(captioner, WINDOWS, "pooled", "npy", tmp_path)
    bulk.run(work, videos(clips), tmp_path / "index.jsonl", batch_memory=budget(work, 2))
    found = dict(bulk.read_features(tmp_path))
    index = {line["path"]: line for line in lines(tmp_path / "index.jsonl")}
    assert len(list(tmp_path.glob("*.npy"))) > 2
    assert any(len(line["features"]) > 1 for line in index.values())  # a video may go on in the next shard
    with DecodePool(1, image_size=32, windows=Windows(4, 3)) as pool, torch.inference_mode():
        for clip in pool.clips(clips):
            expected = captioner.model.encode_video(clip.frames[None])[0, 0]
            assert torch.allclose(found[clip.source][clip.window], expected, atol=1e-4)
            assert len(found[clip.source]) == len(index[clip.source]["frames"])


@pytest.mark.parametrize("moment", ["before the shard", "within the shard", "after the shard"])
def test_a_shard_that_a_killed_run_was_writing_is_removed_and_nothing_else(
    captioner: mf.Captioner, clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Files that others put into the folder stay, whatever their names."""

    def work() -> bulk.Features:
        return bulk.Features(captioner, FRAMES, "pooled", "npy", tmp_path)

    mine = ["features-2024-000001.npy", "features-0000-000007.npy.tmp", "features-0003-000000.safetensors"]
    mine += ["features-0000-notes.txt", "features-0000-000000.json", "mine.npy"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    bulk.run(work(), videos(clips[:2]), tmp_path / "index.jsonl")

    def dying(path: Path, data: bytes, *, overwrite: bool = True) -> None:
        if not overwrite:
            if moment == "within the shard":
                Path(f"{path}.tmp").write_bytes(data[:100])
            elif moment == "after the shard":
                path.write_bytes(data)
            raise KeyboardInterrupt
        write_whole(path, data)

    monkeypatch.setattr(features, "write_whole", dying)
    with pytest.raises(KeyboardInterrupt):
        bulk.run(work(), videos(clips[:4]), tmp_path / "index.jsonl")
    assert len(lines(tmp_path / "index.jsonl")) == 2
    monkeypatch.setattr(features, "write_whole", write_whole)
    bulk.run(work(), videos(clips), tmp_path / "index.jsonl")
    found = {piece["shard"] for line in lines(tmp_path / "index.jsonl") for piece in line["features"]}
    assert len(found) == 2
    assert {path.name for path in tmp_path.iterdir()} == {*found, *mine, "index.jsonl", "index.jsonl.run"}
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    assert list(dict(bulk.read_features(tmp_path))) == clips


def test_features_whose_index_is_lost_are_left_alone(captioner: mf.Captioner, clips: list[str], tmp_path: Path) -> None:
    index, shard = tmp_path / "index.jsonl", tmp_path / "features-0000-000000.npy"

    def run() -> None:
        bulk.run(bulk.Features(captioner, FRAMES, "pooled", "npy", tmp_path), videos(clips), index)

    run()
    whole, data = index.read_bytes(), shard.read_bytes()
    for _ in range(2):  # the first leaves the index empty
        index.unlink(missing_ok=True)
        with pytest.raises(ConfigError, match=r"index\.jsonl has no lines, but .* restore it or use another output"):
            run()
    index.write_bytes(b"")
    with pytest.raises(ConfigError, match="has no lines"):
        run()
    assert shard.read_bytes() == data
    index.write_bytes(whole)
    run()
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"names features-0000-000000\.npy, which is missing: restore it"):
        run()
    with pytest.raises(ConfigError, match=r"the features cannot be read: .*No such file"):
        dict(bulk.read_features(tmp_path))
    shard.write_bytes(data[:200])
    with pytest.raises(ConfigError, match="features cannot be read"):
        dict(bulk.read_features(tmp_path))
    index.write_bytes(whole.replace(b'"features"', b'"feature"', 1))
    with pytest.raises(ConfigError, match=r"index\.jsonl, line 1: this is not a line of an index of features"):
        dict(bulk.read_features(tmp_path))
    with pytest.raises(ConfigError, match=r"line 1: this is not a result of such a run"):
        run()


def test_a_shard_never_replaces_a_file(captioner: mf.Captioner, clips: list[str], tmp_path: Path) -> None:
    def started(plan: bulk.Plan) -> object:
        return lambda videos, failed: (tmp_path / "features-0000-000000.npy").write_text("mine")

    with pytest.raises(MPlug2Error, match=r"features-0000-000000\.npy cannot be written: File exists"):
        bulk.run(
            bulk.Features(captioner, FRAMES, "pooled", "npy", tmp_path),
            videos(clips),
            tmp_path / "index.jsonl",
            started=started,
        )
    assert (tmp_path / "features-0000-000000.npy").read_text() == "mine"
    assert not list(tmp_path.glob("*.tmp"))


def test_lines_wait_for_their_shard(
    captioner: mf.Captioner, clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MPlug2Error("no space left")

    monkeypatch.setattr(features, "write_whole", full)
    work = bulk.Features(captioner, FRAMES, "universal", "safetensors", tmp_path)
    with pytest.raises(MPlug2Error, match="no space left"):
        bulk.run(work, videos(clips), tmp_path / "index.jsonl")
    assert (tmp_path / "index.jsonl").read_bytes() == b""


def test_what_features_cannot_be(captioner: mf.Captioner, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no feature kind 'audio'"):
        bulk.Features(captioner, FRAMES, "audio", "npy", tmp_path)
    half = mf.Captioner(dtype="bfloat16", device="cpu")
    with pytest.raises(ConfigError, match="npy files cannot store bfloat16"):
        bulk.Features(half, FRAMES, "pooled", "npy", tmp_path)


def test_features_in_bfloat16(clips: list[str], tmp_path: Path) -> None:
    captioner = mf.Captioner(dtype="bfloat16", device="cpu")
    work = bulk.Features(captioner, FRAMES, "pooled", "safetensors", tmp_path)
    bulk.run(work, videos(clips), tmp_path / "index.jsonl")
    assert {rows.dtype for _, rows in bulk.read_features(tmp_path)} == {torch.bfloat16}


def test_every_kind_of_damage_is_a_line(captioner: mf.Captioner, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    paths, broken = mixed_files(tmp_path / "files", good=2, broken=20)
    work = bulk.Features(captioner, FRAMES, "pooled", "npy", tmp_path)
    summary = bulk.run(work, videos(paths), tmp_path / "index.jsonl")
    assert (summary.lines, summary.failed) == (22, 20)
    found = lines(tmp_path / "index.jsonl")
    assert {line["path"] for line in found if line["error"]} == broken
    assert all(line["path"] not in line["error"] for line in found if line["error"])


def test_options_that_are_not_given_have_the_defaults(captioner: mf.Captioner) -> None:
    """In the settings, which a resumed run compares, and in the memory of a clip."""
    filled = captioner.generation_options()
    given, none = (bulk.Predict(captioner, FRAMES, options) for options in (filled, {}))
    assert none.settings() == given.settings()
    assert none.bytes_of_clip() == given.bytes_of_clip()
    with pytest.raises(ConfigError, match="captioning has no option beams; it has: num_beams, num_return"):
        bulk.Predict(captioner, FRAMES, {"beams": 2})
