"""Classification on images, videos, texts, and both; labels are kept with the weights."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import mplug2_fast as mf
from mplug2_fast import bulk
from mplug2_fast.datasets import Item
from mplug2_fast.evaluation import evaluate
from mplug2_fast.predict.predictor import TINY_MODEL
from mplug2_fast.tasks import Classification, Regression
from mplug2_fast.text import Tokenizer
from tests.models.test_mplug import SMALL as MPLUG
from tests.tiny import SMALL as MPLUG2
from tests.tiny import random_text, random_video, randomise

LABELS = ("no", "yes", "maybe")


def make(family, config, on, name="verdict"):
    torch.manual_seed(0)
    return family(config, [Classification(LABELS, on, name)])


def batch_of(config, on, frames, rows=3):
    generator = torch.Generator().manual_seed(1)
    size = config.vision.image_size
    batch = {"labels": torch.arange(rows) % len(LABELS)}
    if on != "text":
        batch["video"] = torch.randn(rows, 3, frames, size, size, generator=generator)
    if on != "visual":
        batch["text_ids"] = torch.randint(5, 200, (rows, 6), generator=generator)
        batch["text_mask"] = (torch.arange(6) < torch.tensor([[6], [3], [5]])).long()[:rows]
        batch["text_ids"] *= batch["text_mask"]
    return batch


def test_labels_are_kept_with_the_weights(tmp_path):
    model = make(mf.MPlug, MPLUG, "fused", "verdict")
    model.add_task(Classification(["cat", "dog"], name="animal"))
    mf.checkpoint.save_pretrained(model, tmp_path / "saved")
    stated = json.loads((tmp_path / "saved" / "config.json").read_text())["tasks"]
    assert stated[0] == {"kind": "classification", "labels": list(LABELS), "on": "fused", "name": "verdict"}
    found = mf.checkpoint.inspect(tmp_path / "saved")
    assert (found.ok, found.tasks, found.family) == (True, ("verdict", "animal"), "mPLUG")
    loaded = mf.from_pretrained(tmp_path / "saved")
    assert loaded.tasks["verdict"].labels == LABELS
    one = mf.from_pretrained(tmp_path / "saved", task="animal")
    assert list(one.tasks) == ["animal"]
    assert one.module_names == {"vision"}
    batch = batch_of(MPLUG, "visual", 1)
    expected = model.predict("animal", batch["video"])
    torch.testing.assert_close(one.predict("animal", batch["video"]), expected, rtol=1e-4, atol=1e-5)
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"family": "mplug", "tasks": [{"kind": "poetry"}]}))
    with pytest.raises(mf.CheckpointError, match="no kind of task 'poetry': choose one of classification"):
        mf.from_pretrained(tmp_path / "saved")


def test_items_and_texts():
    task = Classification(["true", "false"], "text", "pairs")
    items = [
        Item("1", text="it rains", text_pair="it is wet", label=True),
        Item("2", text="it rains", label="false"),
    ]
    tokenizer = Tokenizer.from_vocab()
    config = MPLUG.replace(vocab_size=tokenizer.vocab_size)
    for item in items:
        task.require_fields(item)
    batch = task.batch(items, tokenizer, config)
    assert batch["labels"].tolist() == [0, 1]
    for family in (config, MPLUG2):
        ids = task.batch(items, tokenizer, family)["text_ids"]
        assert ids[0].tolist() == [101, 2009, 15811, 102, 2009, 2003, 4954]
    assert task.references(items[0]) == {"true": 1.0}
    model = mf.MPlug(config, [task]).eval()
    ((best,), _) = task.respond(model, tokenizer)(None, ["it rains", "it pours"])
    assert best.text in task.labels
    with pytest.raises(mf.DataError, match="the item 3 has the label 'perhaps', and pairs knows true, false"):
        task.batch([Item("3", text="a", label="perhaps")], tokenizer, config)
    for item, missing in ((Item("4", text="a"), "label"), (Item("5", label="true"), "text")):
        with pytest.raises(mf.DataError, match=f"has no {missing}"):
            task.require_fields(item)


def test_training_lowers_the_loss():
    model = make(mf.MPlug, MPLUG, "visual").train()
    batch = batch_of(MPLUG, "visual", 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.loss("verdict", batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ["one"]}, "from 2 to"),
        ({"labels": ["a", "a"]}, "twice"),
        ({"labels": "ab"}, "list of texts"),
        ({"labels": ["a", ""]}, "not empty"),
        ({"labels": ["a", "b"], "on": "sound"}, "on must be one of visual, text, fused, two_images"),
        ({"labels": ["a", "b"], "name": "a b"}, "is not a valid name for a task"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(mf.ConfigError, match=message):
        Classification(**arguments)


def test_two_images():
    task = Classification(["false", "true"], "two_images", "same")
    model = randomise(mf.MPlug2(MPLUG2, [task, "question_answering"]))
    reference = randomise(mf.reference.MPlug2ForQuestionAnswering(MPLUG2))
    pairs = random_video(MPLUG2, 2, frames=2)
    ids, mask = random_text(MPLUG2, 2, 6)
    with torch.no_grad():
        head = model.heads["same"]
        visual = [reference.encode_video(pairs[:, :, n : n + 1]) + head.types[n] for n in (0, 1)]
        visual, text = torch.cat(visual, dim=1), reference.text_encoder(ids, mask)
        fused = reference.fusion_encoder(text, mask, visual, torch.ones(visual.shape[:2]))[1][:, 0]
        expected = head.classes[1](fused).softmax(dim=-1)
    found = model.predict("same", pairs, text_ids=ids, text_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    alone = model.predict("same", pairs[1:], text_ids=ids[1:, :5], text_mask=mask[1:, :5])
    torch.testing.assert_close(alone, expected[1:], rtol=1e-4, atol=1e-5)
    swapped = model.predict("same", pairs.flip(2), text_ids=ids, text_mask=mask)
    assert not torch.allclose(swapped, found, atol=1e-3)
    batch = {"video": pairs, "text_ids": ids, "text_mask": mask, "labels": torch.tensor([0, 1])}
    model.loss("same", batch).backward()
    assert head.types.grad.abs().sum() > 0
    with pytest.raises(mf.DataError, match="the item 1 has 1 images, and same needs 2 in the field images"):
        task.require_fields(Item("1", images=("a.png",), text="both", label=True))


def test_two_images_from_files(tmp_path):
    Image, _ = pytest.importorskip("PIL.Image"), pytest.importorskip("av")
    pytest.importorskip("pydantic")
    from mplug2_fast.training import data

    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / name)
    task = Classification(["false", "true"], "two_images", "same")
    tokenizer = Tokenizer.from_vocab(mf.checkpoint.vocabulary_path(TINY_MODEL))
    config = mf.MPlug2Config.preset("tiny").replace(vocab_size=tokenizer.vocab_size)
    model = randomise(mf.MPlug2(config, [task]))
    files = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    item = Item("1", images=files, text="both are red", label=True)
    sample = data.ItemDataset([item], [task], config.vision).sample(0, rng)
    batch = task.batch([item], tokenizer, config)
    video = data.video_of([sample], config.vision.image_size)
    expected = model.predict("same", video, text_ids=batch["text_ids"], text_mask=batch["text_mask"])
    classifier = mf.Classifier(model, tokenizer)
    good, bad = classifier.classify_pairs([files, (files[0], "none.png")], "both are red", num_return=2)
    assert dict(good.alternatives)["true"] == pytest.approx(expected[0, 1].item(), abs=1e-5)
    assert bad.error == "none.png: no such file"
    with pytest.raises(mf.ConfigError, match="same needs two images with each text"):
        list(classifier.classify(files[:1], "both are red"))

    items = [item, replace(item, id="2", images=files[::-1]), replace(item, id="3", images=(files[0], "none.png"))]
    report = evaluate(classifier, items, tmp_path / "report", metrics=["accuracy"], options={"num_return": 2})
    assert [each.error for each in report.items] == [None, None, "none.png: no such file"]
    assert {report.items[0].prediction, *report.items[0].alternatives} == {"false", "true"}
    lines = [json.loads(line) for line in (tmp_path / "report" / "predictions.jsonl").read_text().splitlines()]
    scores = {each["text"]: each["score"] for each in lines[0]["alternatives"]}
    assert (lines[0]["path"], scores["true"]) == (" and ".join(files), pytest.approx(expected[0, 1].item(), abs=1e-5))
    assert scores["true"] != pytest.approx(lines[1]["score"], abs=1e-6)
    with pytest.raises(mf.ConfigError, match=r"a\.png: same takes two images at a time, got 1"):
        bulk.run(bulk.Predict(classifier, bulk.Frames(1), {}), [bulk.Source(files[0])], tmp_path / "lines.jsonl")


def test_numbers(tmp_path):
    task = Regression("text", "similarity")
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_vocab()
    model = mf.MPlug(MPLUG.replace(vocab_size=tokenizer.vocab_size), [task]).eval()
    items = [Item("1", text="it rains", text_pair="it pours", label=4.5), Item("2", text="a", text_pair="b", label=1)]
    batch = task.batch(items, tokenizer, model.config)
    found = model.predict(task, text_ids=batch["text_ids"], text_mask=batch["text_mask"])
    expected = ((found - torch.tensor([4.5, 1.0])) ** 2).mean()
    assert model.loss(task, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    texts = [task.text_of(item, model.config) for item in items]
    answers = task.respond(model, tokenizer)(None, texts)
    assert [float(each[0].text) for each in answers] == pytest.approx(found.tolist(), abs=1e-4)
    mf.checkpoint.save_pretrained(model, tmp_path / "saved")
    loaded = mf.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded.predict("similarity", **{k: batch[k] for k in ("text_ids", "text_mask")}), found)
    with pytest.raises(mf.DataError, match="the item 3 has the label 'high', and similarity needs a number"):
        task.batch([Item("3", text="a", label="high")], tokenizer, model.config)
