"""Masked words, prefixes and texts from texts: the reference, rows by themselves, files, and draws."""

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast.datasets import Item
from mplug2_fast.tasks import PRETRAINING
from mplug2_fast.tasks.masked_words import masked
from mplug2_fast.tasks.text_generation import cut
from mplug2_fast.text import Tokenizer
from tests.tiny import SMALL, random_text, random_video, randomise

TASKS = [*PRETRAINING, "text_generation"]
IDS, MASK = random_text(SMALL, 3, 7)
VIDEO = random_video(SMALL, 3)


@pytest.fixture(scope="module")
def model():
    return randomise(mf.MPlug2(SMALL, TASKS))


@pytest.fixture(scope="module")
def reference():
    return randomise(mf.reference.MPlug2ForPreTraining(SMALL))


def batch(name):
    inputs = {} if "text" in name or name == "mlm" else {"video": VIDEO}
    return {**inputs, "text_ids": IDS, "text_mask": MASK}


def test_texts_from_texts(model, reference):
    options = {"num_beams": 3, "min_length": 1, "max_length": 6, "num_return": 2}
    found = model.predict("text_generation", question_ids=IDS, question_mask=MASK, **options)
    expected = reference.generate_from_text(IDS, MASK, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    short = mf.MPlug2(SMALL, ["text_generation"])
    assert short.module_names == {"text", "universal", "decoder"}


def test_one_step_over_all_losses(model):
    found = model.loss({name: {**batch(name), "mask_token_id": torch.full((3,), 103)} for name in PRETRAINING})
    assert list(found) == list(PRETRAINING)
    assert all(value.isfinite() for value in found.values())


def test_draws():
    torch.manual_seed(0)
    ids, mask = random_text(SMALL, 64, 30, padded=True)
    ids[:, -1] = 102
    inputs, labels = masked(ids, mask, torch.full((64,), 103), 200, (101, 102, 0))
    chosen = labels != -100
    words = mask.bool() & (ids != 101) & (ids != 102)
    assert not (chosen & ~words).any()
    assert chosen.sum() / words.sum() == pytest.approx(0.15, abs=0.03)
    assert torch.equal(inputs[~chosen], ids[~chosen])
    assert (inputs[chosen] == 103).float().mean() == pytest.approx(0.8, abs=0.1)
    prefix, prefix_mask, rest, rest_mask = cut(ids, mask)
    lengths = mask.sum(dim=1)
    assert torch.equal(prefix_mask.sum(dim=1) + rest_mask.sum(dim=1), lengths + 1)  # [CLS] twice
    for row in range(64):
        there = prefix[row, : prefix_mask[row].sum()], rest[row, : rest_mask[row].sum()]
        assert torch.equal(torch.cat([there[0], there[1][1:]]), ids[row, : lengths[row]])


def test_files(model, tmp_path):
    words = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "moves"]
    tokenizer = Tokenizer([*words, *(f"[unused{i}]" for i in range(100, 300 - len(words)))])
    mf.checkpoint.save_pretrained(model, tmp_path / "saved")
    assert mf.checkpoint.inspect(tmp_path / "saved").tasks == tuple(TASKS)
    loaded = mf.from_pretrained(tmp_path / "saved", task="mlm")
    assert loaded.module_names == {"text", "universal", "text_mlm"}
    torch.testing.assert_close(loaded.predict("mlm", **batch("mlm")), model.predict("mlm", **batch("mlm")))
    found = mf.predict.Predictor(loaded, tokenizer).predict_texts(["red [MASK] moves", "[MASK] red [MASK]"])
    (first, second) = list(found)
    assert first.text.startswith("red ")
    assert first.text.endswith(" moves")
    assert "[MASK]" not in second.text
    with pytest.raises(mf.ConfigError, match=r"the text has no \[MASK\] to fill"):
        next(mf.predict.Predictor(loaded, tokenizer).predict_texts(["red"]))
    task = loaded.tasks["mlm"]
    made = task.batch([Item("1", text="red moves"), Item("2", text="red")], tokenizer, SMALL)
    assert made["text_ids"].tolist() == [[101, 104, 105, 102], [101, 104, 102, 0]]
    assert made["mask_token_id"].tolist() == [103, 103]
    tensors = mf.official_state_dict(model)
    words_of_text = tensors["text_encoder.embeddings.word_embeddings.weight"]
    mf.load_official(loaded, tensors | {"text_encoder.cls.predictions.decoder.weight": words_of_text})
    with pytest.raises(mf.CheckpointError, match="the model has one tensor for both"):
        mf.load_official(loaded, tensors | {"text_encoder.cls.predictions.decoder.weight": words_of_text + 1})
