"""Masked words, prefixes and texts from texts: the reference, rows by themselves, files, and draws."""

import pytest
import torch
from torch.autograd import gradcheck

import mplug2_fast as mf
from mplug2_fast.datasets import Item
from mplug2_fast.nn.word_head import WordHead
from mplug2_fast.tasks import PRETRAINING
from mplug2_fast.tasks.masked_words import masked
from mplug2_fast.tasks.text_generation import cut
from mplug2_fast.text import Tokenizer
from tests.tiny import SMALL, random_text, random_video, randomise

TASKS = [*PRETRAINING, "text_generation"]
IDS, MASK = random_text(SMALL, 3, 7)
VIDEO = random_video(SMALL, 3)
LABELS = torch.where((torch.arange(7) % 3 == 1) & MASK.bool(), IDS, -100)
PLACES = torch.tensor([2, 3, 1])


@pytest.fixture(scope="module")
def model():
    return randomise(mf.MPlug2(SMALL, TASKS))


@pytest.fixture(scope="module")
def reference():
    return randomise(mf.reference.MPlug2ForPreTraining(SMALL))


def batch(name):
    inputs = {} if "text" in name or name == "mlm" else {"video": VIDEO}
    return {**inputs, "text_ids": IDS, "text_mask": MASK}


def loss(model, name):
    chosen = {"labels": LABELS} if name.endswith("mlm") else {}
    options = {} if name.endswith("mlm") else {"places": PLACES}
    return model.loss(name, {**batch(name), **chosen}, **options)


@pytest.mark.parametrize("name", PRETRAINING)
def test_losses_and_gradients_are_those_of_the_reference(model, reference, name):
    video = batch(name).get("video")
    if name.endswith("mlm"):
        expected = reference.masked_loss(video, IDS, MASK, LABELS)
    else:
        expected = reference.prefix_loss(video, *cut(IDS, MASK, PLACES))
    model.zero_grad()
    reference.zero_grad()
    found = loss(model, name)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    expected.backward()
    ours = model.official_names.views(model, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    compared = {key: each for key, each in reference.official_gradients().items() if each is not None and key in ours}
    assert len(compared) > 20
    torch.testing.assert_close({key: ours[key] for key in compared}, compared, rtol=1e-3, atol=1e-5)


def test_gradients_of_the_head():
    torch.manual_seed(0)
    head = WordHead(SMALL.text).double()
    names, words = dict(head.named_parameters()), torch.randn(5, 64, dtype=torch.float64)
    values = [torch.randn_like(names[name]).requires_grad_() for name in ("norm.weight", "norm.bias", "dense.bias")]
    x = torch.randn(2, 64, dtype=torch.float64)

    def compute(*given):
        replaced = dict(zip(("norm.weight", "norm.bias", "dense.bias"), given, strict=True))
        bias = torch.zeros(5, dtype=torch.float64)
        return torch.func.functional_call(head, {**replaced, "bias": bias}, (x, words))

    assert gradcheck(compute, values, fast_mode=True)


@pytest.mark.parametrize("name", ["mlm", "fused_mlm"])
def test_a_row_does_not_depend_on_the_others(model, name):
    inputs = batch(name)
    together = model.predict(name, **inputs)
    for row, length in enumerate(MASK.sum(dim=1).tolist()):
        alone = {key: each[row : row + 1] for key, each in inputs.items()}
        alone = {key: each if key == "video" else each[:, :length] for key, each in alone.items()}
        torch.testing.assert_close(model.predict(name, **alone)[0], together[row, :length], rtol=1e-4, atol=1e-4)


def test_the_head_compiles(model):
    head, words = torch.compile(model.text_mlm, fullgraph=True, backend="eager"), model.text.embeddings.word.weight
    torch.testing.assert_close(head(words[:9], words), model.text_mlm(words[:9], words))


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
