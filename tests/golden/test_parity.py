"""Both implementations against what the released code computed, in float32."""

import pytest
import torch

import mplug2_fast as mf
from tests.golden.cases import CAPTIONING, QUESTION_ANSWERING, GoldenCase, relative_error

CASES = {name: GoldenCase(name) for name in (*CAPTIONING, *QUESTION_ANSWERING)}


@pytest.fixture(params=["reference", "fast"])
def library(request):
    return mf.reference if request.param == "reference" else mf


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_every_needed_key_is_a_released_key(case, library):
    shapes = {key: tuple(shape) for key, shape in case.description["keys"].items()}
    for key, view in case.model(library).released_parameters().items():
        assert tuple(view.shape) == shapes[key], key


def test_hidden_states(case, library):
    model = case.model(library)
    with torch.no_grad():
        assert relative_error(model.encode_visual(case.video), case.expected["visual"]) < 1e-4
        assert relative_error(model.encode_video(case.video), case.expected["image_embeds"]) < 1e-4


def test_universal_layers(case, library):
    model = case.model(library)
    universal = model.universal if library is mf else model.text_encoder.v_module
    with torch.no_grad():
        assert relative_error(universal(case.expected["visual"]), case.expected["universal"]) < 1e-4


@pytest.mark.parametrize("name", CAPTIONING)
def test_teacher_forced_logits(name, library):
    case = CASES[name]
    model = case.model(library)
    ids, mask = case.inputs["teacher_ids"], case.inputs["teacher_mask"]
    with torch.no_grad():
        embeds = model.encode_video(case.video)
        if library is mf:
            decoder = model.decoder
            logits = decoder(ids[:, None], mask[:, None], decoder.remember(embeds))[:, 0]
        else:
            logits = model.text_decoder(ids, mask, embeds, None)
    assert relative_error(logits, case.expected["teacher_logits"]) < 1e-4


@pytest.mark.parametrize("name", QUESTION_ANSWERING)
def test_text_and_fusion(name, library):
    case = CASES[name]
    model = case.model(library)
    ids, mask = case.question["question_ids"], case.question["question_mask"]
    with torch.no_grad():
        visual = model.encode_video(case.video)
        if library is mf:
            text = model.text(ids, mask, model.universal)
            fused = model.fusion(text, mask, visual)
        else:
            text = model.text_encoder(ids, mask)
            fused = model.fusion_encoder(text, mask, visual, mask.new_ones(visual.shape[:2]))
    assert relative_error(text, case.expected["text"]) < 1e-4
    assert relative_error(fused[0], case.expected["fusion_image"]) < 1e-4
    assert relative_error(fused[1], case.expected["fusion_text"]) < 1e-4


def test_beam_search(case, library):
    expected_ids, expected_scores = case.expected["beam_ids"], case.expected["beam_scores"]
    out = case.model(library).generate(case.video, **case.question, num_return=expected_ids.shape[1])
    torch.testing.assert_close(out.scores, expected_scores, atol=1e-3, rtol=0)
    assert out.sequences.tolist() == expected_ids.tolist()


@pytest.mark.parametrize("name", QUESTION_ANSWERING)
def test_ranking(name, library):
    case = CASES[name]
    answers = case.inputs["answer_list_ids"], case.inputs["answer_list_mask"]
    indices, probabilities = case.model(library).rank_answers(case.video, *case.question.values(), *answers, k=6)
    assert indices.tolist() == case.expected["rank_ids"].tolist()
    torch.testing.assert_close(probabilities, case.expected["rank_probs"], atol=1e-4, rtol=0)


def test_training_step(case, library):
    model = case.model(library).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = case.loss(model)
    loss.backward()
    assert abs(loss.item() / case.expected["loss"].item() - 1) < 1e-4
    named = model.named_parameters()
    gradients = model.released_gradients() if library is mf else {name: p.grad for name, p in named}
    compared = [key for key in case.expected if key.startswith("grad:")]
    assert len(compared) >= 8
    for key in compared:
        assert relative_error(gradients[key.removeprefix("grad:")], case.expected[key]) < 1e-3, key
