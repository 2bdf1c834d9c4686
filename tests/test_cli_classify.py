"""Commands that classify files and texts, match texts with files, and compute features for comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import mplug2_fast as mf
from mplug2_fast import bulk
from mplug2_fast.checkpoint import convert, save_pretrained
from mplug2_fast.checkpoint.source import vocabulary_path
from mplug2_fast.cli import app
from mplug2_fast.predict.predictor import TINY_MODEL
from mplug2_fast.ray import Results
from mplug2_fast.tasks import Classification, ZeroShot
from mplug2_fast.text import Tokenizer
from tests.bulk.files import write_clip

LABELS = ["left", "right", "still"]
TEXTS = ["the red square moves left", "the circle grows"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    clip = {"token_width": 16, "token_layers": 1, "token_heads": 1, "joint_dim": 8}
    words = Tokenizer.from_vocab(vocabulary_path(TINY_MODEL)).vocab_size
    config = mf.MPlug2Config.preset("tiny").replace(initializer_range=0.2, clip=clip, vocab_size=words)
    classes = [Classification(LABELS, on, f"by_{on}") for on in ("visual", "text", "fused")]
    model = mf.MPlug2(config, [*classes, "retrieval", "clip"]).eval()
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    return str(save_pretrained(model, folder, vocab=vocabulary_path(TINY_MODEL)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(("a.mp4", "b.mp4")):
        write_clip(folder / name, "libx264", seed)
    return folder


@pytest.fixture
def files(folder: Path) -> list[str]:
    return [str(folder / "a.mp4"), str(folder / "b.mp4")]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def objects(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_classes_of_videos(checkpoint: str, folder: Path, files: list[str], tmp_path: Path) -> None:
    found = run("classify", *files, "--checkpoint", checkpoint, "--num-return", 3)
    assert found.exit_code == 0, found.stderr
    rows = [line.split("\t") for line in found.stdout.splitlines()]
    assert [row[0] for row in rows] == [file for file in files for _ in range(3)]
    assert sorted(row[1] for row in rows[:3]) == LABELS
    assert sum(float(row[2]) for row in rows[:3]) == pytest.approx(1, abs=1e-3)
    command = ["classify", folder, "--checkpoint", checkpoint, "--out", tmp_path / "classes.jsonl"]
    assert run(*command).exit_code == 0
    assert "2 classes, 0 failed; nothing left to do" in run(*command).stderr
    lines = objects((tmp_path / "classes.jsonl").read_text())
    assert [(line["path"], line["text"]) for line in lines] == [(row[0], row[1]) for row in rows[::3]]


@pytest.mark.parametrize("space", ["contrast", "clip"])
def test_classes_by_their_names(checkpoint: str, files: list[str], space: str) -> None:
    named = ["--label", "left", "--label", "right", "--template", "a red square moves {}", "--num-return", 2]
    found = run("classify", *files, *named, "--features", space, "--checkpoint", checkpoint)
    assert found.exit_code == 0, found.stderr
    rows = [line.split("\t") for line in found.stdout.splitlines()]
    assert sorted(row[1] for row in rows[:2]) == ["left", "right"]
    task = ZeroShot(["left", "right"], space, ["a red square moves {}"])
    (result,) = mf.Classifier(checkpoint, task=task).classify(files[1])
    assert (rows[2][1], float(rows[2][2])) == (result.text, pytest.approx(result.score, abs=1e-4))


def test_views_are_averaged(checkpoint: str, files: list[str], tmp_path: Path) -> None:
    """Clips and crops give the mean of the probabilities of the single views."""
    classifier = mf.Classifier(checkpoint, task="by_visual", clips=2, crops=3)
    found = {result.path: result for result in classifier.classify(files, num_return=3)}
    decoded = next(classifier.decoded(files[:1], 0, 60.0)).video
    assert decoded.shape == (1, 6, 3, 4, 32, 32)
    expected = torch.cat([classifier.model.predict("by_visual", view[None]) for view in decoded[0]]).mean(dim=0)
    assert dict(found[files[0]].alternatives) == pytest.approx(
        dict(zip(LABELS, expected.tolist(), strict=True)), abs=1e-5
    )
    assert len(found[files[0]].frames) == 8
    one_crop = next(mf.Classifier(checkpoint, clips=2).decoded(files[:1], 0, 60.0)).video[0]
    both = mf.load_video(files[0], 8, 32)
    torch.testing.assert_close(one_crop, torch.stack([both[:, 0::2], both[:, 1::2]]))
    run("classify", *files, "--checkpoint", checkpoint, "--clips", 2, "--crops", 3, "--out", tmp_path / "views.jsonl")
    lines = objects((tmp_path / "views.jsonl").read_text())
    assert [line["score"] for line in lines] == pytest.approx([found[file].score for file in files], abs=1e-4)


def test_classes_of_texts(checkpoint: str, files: list[str], tmp_path: Path) -> None:
    alone = ["classify", "--checkpoint", checkpoint, "--task", "by_text"]
    printed = run(*alone, "--text", TEXTS[0], "--json")
    assert printed.exit_code == 0, printed.stderr
    (line,) = objects(printed.stdout)
    assert (line["question"], line["error"]) == (TEXTS[0], None)
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, TEXTS[0]]) + "\n")
    command = [*alone, "--texts", tmp_path / "texts.txt", "--out", tmp_path / "classes.jsonl"]
    summary = run(*command)
    assert summary.exit_code == 0, summary.stderr
    assert ": 2 classes, 0 failed; 2 texts in " in summary.stderr
    assert "nothing left to do" in run(*command).stderr
    lines = objects((tmp_path / "classes.jsonl").read_text())
    assert [each["question"] for each in lines] == TEXTS
    assert (lines[0]["text"], lines[0]["score"]) == (line["text"], pytest.approx(line["score"], abs=1e-5))
    both = run("classify", *files, "--text", TEXTS[0], "--checkpoint", checkpoint, "--task", "by_fused")
    assert [row.split("\t")[0] for row in both.stdout.splitlines()] == files


def test_steps_for_ray(checkpoint: str, files: list[str]) -> None:
    classify = {"predictor": mf.Classifier, "num_return": 2}
    found = Results(checkpoint, **classify)({"path": np.array([files[0], "none.mp4"], dtype=object)})
    (result,) = mf.Classifier(checkpoint).classify(files[0])
    assert (found["text"].tolist(), found["error"][1]) == ([result.text, None], "no such file")
    by_text = Results(checkpoint, **classify, arguments={"task": "by_text"})
    found = by_text({"text": np.array(TEXTS, dtype=object)})
    expected = [each.text for each in mf.Classifier(checkpoint, task="by_text").predict_texts(TEXTS)]
    assert found["text"].tolist() == expected


def test_texts_from_texts(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    command = ["generate-text", "--texts", tmp_path / "texts.txt", "--max-length", 4]
    printed = run(*command)
    assert printed.exit_code == 0, printed.stderr
    assert run(*command, "--out", tmp_path / "out.jsonl").exit_code == 0
    lines = objects((tmp_path / "out.jsonl").read_text())
    assert [f"{line['question']}\t{line['text']}" for line in lines] == printed.stdout.splitlines()


def test_evaluation_of_texts_alone(checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the report needs the extra evaluate")
    items = [{"id": str(n), "text": text, "label": LABELS[n]} for n, text in enumerate([*TEXTS, TEXTS[0]])]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    given = ["--data", tmp_path / "test.jsonl", "--task", "by_text", "--metric", "accuracy"]
    found = run("evaluate", *given, "--checkpoint", checkpoint, "--out", tmp_path / "report")
    assert found.exit_code == 0, found.stderr
    results = mf.Classifier(checkpoint, task="by_text").predict_texts([item["text"] for item in items])
    right = sum(result.text == item["label"] for result, item in zip(results, items, strict=True))
    assert float(found.stdout.split()[1]) == pytest.approx(100 * right / 3, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--task", "by_text", "a.mp4"], "by_text takes texts alone: use --text"),
        (["--task", "by_visual", "--text", "left"], "by_visual needs a video or an image with each text"),
        (["--task", "by_text", "--text", "left", "--clips", "2"], "by_text takes texts alone, which have no clips"),
        (["--task", "retrieval", "a.mp4"], "the checkpoint has no classification, only retrieval"),
        ([], "give either files or --texts"),
    ],
)
def test_bad_options(checkpoint: str, arguments: list[str], reason: str) -> None:
    found = run("classify", "--checkpoint", checkpoint, *arguments)
    assert found.exit_code == 2
    assert reason in " ".join(found.stderr.replace("│", " ").split())


def test_match_is_the_probability_of_the_matching_head(checkpoint: str, files: list[str], tmp_path: Path) -> None:
    found = run("match", *files, "--text", TEXTS[0], "--checkpoint", checkpoint)
    assert found.exit_code == 0, found.stderr
    ranking = mf.Retriever(checkpoint).retrieve(files, TEXTS[:1], rerank=2)
    printed = [float(line.split("\t")[2]) for line in found.stdout.splitlines()]
    assert all(0 < score < 1 for score in printed)
    assert (printed[0] < printed[1]) == bool(ranking.by_file[0] < ranking.by_file[1])
    assert run("match", *files, "--text", TEXTS[0], "--checkpoint", checkpoint, "--out", tmp_path / "m").exit_code == 0
    lines = objects((tmp_path / "m").read_text())
    assert [line["score"] for line in lines] == pytest.approx(printed, abs=1e-4)
    answers = convert(TINY_MODEL, tmp_path / "answers", task="question_answering")
    other = run("match", *files, "--text", TEXTS[0], "--checkpoint", answers)
    assert other.exit_code == 2
    assert "no weights for itm_head, temp, text_proj, vision_proj: train them, or pass a file that" in other.stderr


@pytest.mark.parametrize("space", ["contrast", "clip"])
def test_features_of_files_and_texts_compare_as_retrieval_does(
    checkpoint: str, folder: Path, files: list[str], tmp_path: Path, space: str
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    usual = ["--checkpoint", checkpoint, "--kind", space, "--format", "npy", "--out"]
    for given, out in ((folder, "videos"), ("--texts", "texts")):
        more = [tmp_path / "texts.txt"] if out == "texts" else []
        found = run("features", given, *more, *usual, tmp_path / out)
        assert found.exit_code == 0, found.stderr
    found = run("features", "--texts", tmp_path / "texts.txt", *usual, tmp_path / "texts")
    assert "2 features, 0 failed; nothing left to do" in found.stderr
    videos, texts = (dict(bulk.read_features(tmp_path / out)) for out in ("videos", "texts"))
    assert (list(videos), list(texts)) == (files, TEXTS)
    scores = torch.cat(list(videos.values())) @ torch.cat(list(texts.values())).T
    task = {"contrast": "retrieval"}.get(space, space)
    ranking = mf.Retriever(checkpoint, task=task).retrieve(files, TEXTS)
    torch.testing.assert_close(scores, ranking.by_file, rtol=1e-4, atol=1e-5)
    found = run("retrieve", *files, "--text", TEXTS[0], "--features", space, "--checkpoint", checkpoint, "--json")
    assert json.loads(found.stdout)["results"][0]["score"] == pytest.approx(scores[:, 0].max().item(), abs=1e-4)
