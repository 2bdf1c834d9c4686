"""The stand-in for the official model reproduces the official results, also when accelerated."""

import pytest
import torch

import mplug2_fast as mf
from tests.acceleration.official import MPLUG2, pair
from tests.golden.cases import CAPTIONING, QUESTION_ANSWERING, GoldenCase, relative_error

CASES = {name: GoldenCase(name) for name in (*CAPTIONING, *QUESTION_ANSWERING)}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=["as it is", "accelerated"])
def model(request, case):
    model = MPLUG2.of(case)
    if request.param == "accelerated":
        mf.accelerate(model)
    return model


def test_official_keys(case):
    shapes = {key: tuple(value.shape) for key, value in MPLUG2.of(case).state_dict().items()}
    assert shapes == {key: tuple(shape) for key, shape in case.description["keys"].items()}


def test_hidden_states(case, model):
    with torch.no_grad():
        assert relative_error(model.encode_visual(case.video), case.expected["visual"]) < 1e-5
        assert relative_error(model.universal(case.expected["visual"]), case.expected["universal"]) < 1e-5
        assert relative_error(model.encode_video(case.video)[0], case.expected["image_embeds"]) < 1e-5


def test_beam_search(case, model):
    expected_ids, expected_scores = case.expected["beam_ids"].tolist(), case.expected["beam_scores"].tolist()
    for hypotheses, ids, scores in zip(model.generate(case), expected_ids, expected_scores, strict=True):
        assert [h[1] for h in hypotheses[: len(ids)]] == [[i for i in row if i >= 0] for row in ids]
        assert [h[0] for h in hypotheses[: len(ids)]] == pytest.approx(scores, abs=1e-4)


def test_training_step(case, model):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = model.loss(case)
    loss.backward()
    assert loss.item() == pytest.approx(case.expected["loss"].item(), rel=1e-4)
    named = dict(model.named_parameters())
    compared = [key for key in case.expected if key.startswith("grad:")]
    assert len(compared) >= 8
    for key in compared:
        assert relative_error(named[key.removeprefix("grad:")].grad, case.expected[key]) < 1e-3, key


@pytest.mark.parametrize("case", [CASES[name] for name in CAPTIONING], ids=CAPTIONING)
def test_teacher_forced_logits(case, model):
    ids, mask = case.inputs["teacher_ids"], case.inputs["teacher_mask"]
    with torch.no_grad():
        embeds, image_mask = model.encode_video(case.video)
        logits = model.text_decoder(
            ids, attention_mask=mask, encoder_hidden_states=embeds, encoder_attention_mask=image_mask
        ).logits
    assert relative_error(logits, case.expected["teacher_logits"]) < 1e-5


@pytest.mark.parametrize("case", [CASES[name] for name in QUESTION_ANSWERING], ids=QUESTION_ANSWERING)
def test_questions(case, model):
    question = pair(case, "question")
    with torch.no_grad():
        text = model.text_encoder(question.input_ids, attention_mask=question.attention_mask).last_hidden_state
        states, _ = model.encode_question(case.video, question)
        ids, probabilities = model(case.video, question, pair(case, "answer_list"), k=6, train=False, rerank=True)
    fused = torch.cat([case.expected["fusion_image"], case.expected["fusion_text"]], dim=1)
    assert relative_error(text, case.expected["text"]) < 1e-5
    assert relative_error(states, fused) < 1e-5
    assert ids.tolist() == case.expected["rank_ids"].tolist()
    torch.testing.assert_close(probabilities, case.expected["rank_probs"], atol=1e-4, rtol=0)
