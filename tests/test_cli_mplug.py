"""Commands on images with an mPLUG model: boxes, rankings, their evaluation, and broken files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import mplug2_fast as mf
from mplug2_fast.checkpoint import save_pretrained
from mplug2_fast.cli import app
from mplug2_fast.datasets import read_items
from mplug2_fast.errors import ConfigError
from mplug2_fast.predict import Grounder, Retriever
from mplug2_fast.tasks import gallery
from mplug2_fast.text import Tokenizer
from mplug2_fast.training.validation import Validator

WORDS = "the red blue green circle square of a left right what color is yes no"
USUAL = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
VOCABULARY = [*USUAL, *(f"[unused{i}]" for i in range(100, 800 - len(USUAL)))]
REASON = "is corrupt: Pillow cannot decode it"
TASKS = ["captioning", "question_answering", "grounding", "retrieval"]
TEXTS = ["a red circle", "the blue square", "green"]


@pytest.fixture(scope="module")
def model() -> mf.MPlug:
    torch.manual_seed(0)
    config = mf.MPlugConfig.preset("tiny").replace(vocab_size=len(VOCABULARY), initializer_range=0.2, max_length=5)
    return mf.MPlug(config, TASKS).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(VOCABULARY)


@pytest.fixture(scope="module")
def checkpoint(model: mf.MPlug, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "words.txt").write_text("\n".join(VOCABULARY) + "\n")
    return str(save_pretrained(model, folder / "mplug", vocab=folder / "words.txt"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, one of which is turned by its EXIF orientation, and a broken one."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, (width, height), turn in (("a.png", (60, 40), 1), ("b.jpg", (40, 80), 6), ("c.png", (50, 50), 1)):
        image = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = turn
        image.resize((width, height), Image.Resampling.NEAREST).save(folder / name, exif=exif)
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:60])
    return folder


@pytest.fixture
def files(folder: Path) -> list[str]:
    return [str(folder / name) for name in ("a.png", "bad.png", "b.jpg", "c.png")]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def objects(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# --- ground -----------------------------------------------------------------------------------------------------------


def test_boxes_are_pixels_of_the_upright_picture(
    checkpoint: str, files: list[str], model: mf.MPlug, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    found = run("ground", *files, "--text", "the red circle", "--checkpoint", checkpoint, "--draw", tmp_path / "drawn")
    assert found.exit_code == 2
    (error,) = (line for line in found.stderr.splitlines() if line.startswith("error:"))
    assert error.startswith(f"error: {files[1]}: {REASON}")
    results = [result for result in Grounder(model, tokenizer).ground(files, "the red circle") if result.error is None]
    lines = [f"{result.path}\t{' '.join(f'{side:.1f}' for side in result.box)}" for result in results]
    assert found.stdout.splitlines() == lines
    for result, size in zip(results, [(60, 40), (80, 40), (50, 50)], strict=True):
        left, top, right, bottom = result.box
        assert result.size == size
        assert 0 <= left <= right <= size[0]
        assert 0 <= top <= bottom <= size[1]
        drawn = Image.open(tmp_path / "drawn" / f"{Path(result.path).stem}.png")
        assert drawn.size == size
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["a.png", "b.png", "c.png"]


def test_boxes_in_a_file(checkpoint: str, folder: Path, files: list[str], tmp_path: Path) -> None:
    command = ["ground", folder, "--text", "red", "--checkpoint", checkpoint, "--out", tmp_path / "boxes.jsonl"]
    assert run(*command).exit_code == 2
    assert "nothing left to do" in run(*command).stderr
    lines = objects((tmp_path / "boxes.jsonl").read_text())
    assert [Path(line["path"]).name for line in lines] == ["a.png", "b.jpg", "bad.png", "c.png"]
    printed = objects(run("ground", files[2], "--text", "red", "--checkpoint", checkpoint, "--json").stdout)[0]
    assert lines[1]["box"] == pytest.approx(printed["box"], abs=0.02)
    assert (lines[2]["box"], lines[2]["box_relative"]) == (None, None)
    x, y, width, height = lines[1]["box_relative"]
    left, top, right, bottom = lines[1]["box"]
    assert [x * 80, y * 40, width * 80, height * 40] == pytest.approx(
        [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], abs=0.02
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--draw", "box.xyz"], "box.xyz: pictures cannot be written in this format"),
        (["--draw", "/proc/none/box.png"], "/proc/none/box.png: the picture cannot be written: No such file"),
        (["--draw", "box.png", "--out", "boxes.jsonl"], "--draw: not with --out"),
        (["--texts", "texts.jsonl"], "give either --text or, with --out, --texts"),
    ],
)
def test_bad_options_of_ground(checkpoint: str, files: list[str], options: list[str], reason: str) -> None:
    found = run("ground", files[0], "--text", "red", "--checkpoint", checkpoint, *options)
    assert found.exit_code == 2
    assert reason in found.stderr


# --- rank -------------------------------------------------------------------------------------------------------------


def test_rank_is_answer_with_candidates(checkpoint: str, files: list[str], tmp_path: Path) -> None:
    options = ["--question", "what color is the circle", "--candidate", "red", "--candidate", "blue"]
    options += ["--checkpoint", checkpoint, "--num-return", "2"]
    ranked, answered = run("rank", files[0], *options), run("answer", files[0], *options)
    assert ranked.exit_code == 0
    assert ranked.stdout == answered.stdout
    assert sorted(line.split("\t")[1] for line in ranked.stdout.splitlines()) == ["blue", "red"]
    assert run("rank", files[0], *options, "--out", tmp_path / "a.jsonl").exit_code == 0
    assert "--candidate or --candidates" in run("rank", files[0], "--question", "what").stderr


# --- retrieve ---------------------------------------------------------------------------------------------------------


def test_retrieval_in_both_directions(
    checkpoint: str, folder: Path, files: list[str], model: mf.MPlug, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[1:]))
    options = ["--text", TEXTS[0], "--texts", tmp_path / "texts.txt", "--checkpoint", checkpoint, "--rerank", "2"]
    by_text = run("retrieve", folder, *options)
    assert by_text.exit_code == 2
    assert f"error: {files[1]}: {REASON}" in by_text.stderr
    good = [files[0], files[2], files[3]]
    ranking = Retriever(model, tokenizer).retrieve([files[0], *files[2:], files[1]], TEXTS, rerank=2)
    assert ranking.paths == good
    assert str(ranking.results[3].error).startswith(REASON)
    visual = torch.cat([Retriever(model, tokenizer).encode(each.video)[0] for each in decoded(model, tokenizer, good)])
    ids, mask = model.config.wording.descriptions(tokenizer, TEXTS, video=False, training=False)
    expected = model.predict("retrieval", image_embeds=visual, text_ids=ids, text_mask=mask, k=2)
    torch.testing.assert_close(ranking.by_text, expected.by_text, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ranking.by_file, expected.by_visual, rtol=1e-4, atol=1e-4)
    rows = [line.split("\t") for line in by_text.stdout.splitlines()]
    assert rows == [
        [text, match.name, f"{match.score:.4f}"]
        for text, matches in zip(TEXTS, ranking.best_files(5), strict=True)
        for match in matches
    ]
    assert len(rows) == 2 * len(TEXTS)  # pairs that are not re-ranked are left out

    assert run("retrieve", folder, *options, "--by", "file", "--top", 1, "--out", tmp_path / "found").exit_code == 2
    lines = objects((tmp_path / "found").read_text())
    assert [line["path"] for line in lines] == [*good, files[1]]
    assert [line["results"] for line in lines[:3]] == [
        [{"text": matches[0].name, "score": pytest.approx(matches[0].score, abs=1e-4)}]
        for matches in ranking.best_texts(1)
    ]
    assert lines[3]["results"] == []


def decoded(model: mf.MPlug, tokenizer: Tokenizer, paths: list[str]) -> list:
    return list(Retriever(model, tokenizer).decoded(paths, 0, None))


def test_tokens_that_do_not_fit_into_memory(
    model: mf.MPlug, tokenizer: Tokenizer, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "available_memory", lambda: 2**17)
    retriever = Retriever(model, tokenizer)
    assert retriever.retrieve(files, TEXTS).by_text.shape == (3, 3)
    with pytest.raises(ConfigError, match=r"the visual tokens of 50,000 files in memory, which takes .* GiB"):
        list(retriever.add(retriever.gallery(50_000, rerank=1), files))


def test_without_any_readable_file(checkpoint: str, files: list[str]) -> None:
    found = run("retrieve", files[1], "--text", "red", "--checkpoint", checkpoint)
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.splitlines()[-1].startswith(f"error: {files[1]}: {REASON}")


def test_texts_that_cannot_be_read(model: mf.MPlug, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="'!!' is empty without its punctuation"):
        Retriever(model, tokenizer).check_text("!!")
    short = mf.MPlug(model.config.replace(max_position_embeddings=16), TASKS, device="meta")
    for predictor, text in ((Retriever, "red " * 30), (Grounder, "red")):
        with pytest.raises(ConfigError, match="tokens, and the model reads at most 16"):
            predictor(short, tokenizer).check_text(text)


# --- evaluation and validation ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    """Two items share a picture; one has two captions; one picture is broken."""
    lines = [
        {"id": "1", "image": "a.png", "caption": ["a red circle", "red"]},
        {"id": "2", "image": "b.jpg", "caption": "the blue square"},
        {"id": "3", "image": "bad.png", "caption": "green"},
        {"id": "4", "image": "c.png", "caption": "a square"},
        {"id": "5", "image": "b.jpg", "caption": "left of the circle"},
    ]
    boxed = [{**line, "text": "the red circle", "box": [0.5, 0.5, 1.0, 1.0]} for line in lines]
    (folder / "items.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in boxed))
    return folder / "items.jsonl"


def test_evaluation_of_retrieval(
    checkpoint: str, data: Path, model: mf.MPlug, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="reports need the extra evaluate")
    command = ["evaluate", "--data", data, "--task", "retrieval", "--checkpoint", checkpoint, "--out", tmp_path]
    done = run(*command, "--json", "--option", "rerank=3")
    assert done.exit_code == 2
    report = json.loads(done.stdout)
    assert (report["settings"]["items"], report["settings"]["failed"], report["settings"]["rerank"]) == (5, 1, 3)

    items = read_items(data)
    texts, owners = [text for item in items for text in item.caption], [0, 0, 1, 2, 3, 1]
    paths = [str(data.parent / name) for name in ("a.png", "b.jpg", "c.png")]
    ranking = Retriever(model, tokenizer).retrieve(paths, texts, rerank=3)
    rows = {0: 0, 1: 1, 3: 2}
    to_file = [
        1 + int((ranking.by_text[text] > ranking.by_text[text, rows[owner]]).sum()) if owner in rows else np.inf
        for text, owner in enumerate(owners)
    ]
    to_text = [np.inf] * 4
    for owner, row in rows.items():
        wrong = [text for text in range(6) if owners[text] != owner]
        best = max(float(ranking.by_file[row, text]) for text in range(6) if text not in wrong)
        # Pairs that are not re-ranked come last, the right ones behind the wrong ones.
        ahead = ranking.by_file[row] > best if best > -100 else torch.ones(6, dtype=torch.bool)
        to_text[owner] = 1 + int(ahead[wrong].sum())
    for way, ranks in (("visual", to_file), ("text", to_text)):
        for cutoff in (1, 5, 10):
            expected = 100 * np.mean([rank <= cutoff for rank in ranks])
            assert report["metrics"][f"{way}_recall@{cutoff}"] == pytest.approx(expected)
        assert report["metrics"][f"{way}_median_rank"] == np.median(ranks)
    lines = objects((tmp_path / "items.jsonl").read_text())
    assert [line["prediction"] for line in lines if line["id"] in "124"] == [
        matches[0].name for matches in ranking.best_texts(1)
    ]

    for options, reason in ((["--metric", "cider"], "has its own metrics"), (["--retry-failed"], "retry_failed")):
        refused = run(*command, *options)
        assert refused.exit_code == 2
        assert reason in refused.stderr
    assert validated("retrieval", items, model, tokenizer, rerank=3) == pytest.approx(report["metrics"])


def test_evaluation_of_grounding(
    checkpoint: str, data: Path, model: mf.MPlug, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="reports need the extra evaluate")
    command = ["evaluate", "--data", data, "--task", "grounding", "--checkpoint", checkpoint, "--out", tmp_path]
    done = run(*command, "--json")
    assert done.exit_code == 2
    report, items = json.loads(done.stdout), read_items(data)
    found = Grounder(model, tokenizer).ground([str(item.image) for item in items], "the red circle")
    areas = [
        0.0
        if result.error
        else 100 * (result.box[2] - result.box[0]) * (result.box[3] - result.box[1]) / np.prod(result.size)
        for result in found
    ]  # the right box is the whole picture
    lines = objects((tmp_path / "items.jsonl").read_text())
    assert all(line["scores"]["iou"] <= area + 0.1 for line, area in zip(lines, areas, strict=True))
    assert report["metrics"]["iou"] > 0
    assert validated("grounding", items, model, tokenizer) == pytest.approx(report["metrics"], abs=0.01)


def validated(task: str, items: list, model: mf.MPlug, tokenizer: Tokenizer, **options: int) -> dict[str, float]:
    """The scores of a validation in training include the main one."""
    validator = Validator(items, model.tasks[task], model.config, "", options, "items")
    scores = validator.scores(model, tokenizer, torch.device("cpu"))
    assert validator.metric in scores
    return scores
