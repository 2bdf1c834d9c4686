"""The compiled peer computes what the reference computes; otherwise its times would mean nothing."""

import pytest
import torch
from torch.testing import assert_close

import mplug2_fast as mf
from bench.peer import Peer
from bench.weights import fill
from mplug2_fast import MPlug2Config, reference
from mplug2_fast.models import mplug2
from mplug2_fast.models.config import SEP_TOKEN_ID
from tests.tiny import random_text
from tests.tolerance import relative

TINY = MPlug2Config.preset("tiny")
KINDS = {
    "captioning": (reference.MPlug2ForCaptioning, mplug2.MPlug2ForCaptioning),
    "answering": (reference.MPlug2ForQuestionAnswering, mplug2.MPlug2ForQuestionAnswering),
}


def build(config, task="captioning", end_bias=0.0):
    """Reference and peer with the same weights, and two videos."""
    models = [kind(config, device="meta").to_empty(device="cpu").eval() for kind in KINDS[task]]
    for model in models:
        parameters = model.official_parameters()
        fill(parameters)
        with torch.no_grad():
            parameters["text_decoder.cls.predictions.bias"][SEP_TOKEN_ID] += end_bias
    size = config.vision.image_size
    video = torch.randn(2, 3, 4, size, size, generator=torch.Generator().manual_seed(3))
    models[1].requires_grad_(False)
    return models[0], Peer(models[1]), video


@pytest.mark.parametrize(
    "changes", [{}, {"width": 64}, {"temporal_downsampling": True}], ids=["tiny", "projected", "downsampled"]
)
@torch.no_grad()
def test_image_embeds(changes):
    model, peer, video = build(TINY.replace(**changes))
    assert_close(peer.encode_visual(video), model.encode_visual(video), rtol=1e-4, atol=1e-4)
    assert_close(peer.encode_video(video), model.encode_video(video), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("end_bias", [0.0, 3.0, 6.0])
@pytest.mark.parametrize(("beams", "min_length", "max_length"), [(5, 9, 9), (5, 2, 12), (3, 1, 12), (1, 1, 6)])
def test_beam_search(end_bias, beams, min_length, max_length):
    model, peer, video = build(TINY, end_bias=end_bias)
    expected = model.generate(video, num_beams=beams, min_length=min_length, max_length=max_length)
    ids, scores = peer.decode(peer.encode_video(video), beams, min_length, max_length)
    assert torch.equal(ids[:, : expected.sequences.shape[2]], expected.sequences[:, 0])
    assert (ids[:, expected.sequences.shape[2] :] == -1).all()
    assert_close(scores, expected.scores[:, 0], rtol=1e-4, atol=1e-4)


def test_these_searches_meet_the_end_token():
    model, _, video = build(TINY, end_bias=6.0)
    out = model.generate(video, num_beams=5, min_length=2, max_length=12)
    assert (out.sequences == SEP_TOKEN_ID).any()


@pytest.mark.parametrize(
    "changes", [{}, {"stride_layer": 1}, {"width": 64}], ids=["tiny", "connected layers", "projected"]
)
def test_answers(changes):
    config = TINY.replace(stored_layers=3, fusion_layers=3, **changes)
    model, peer, video = build(config, "answering")
    question, mask = random_text(config, 2, 7)
    assert mask.sum(dim=1).tolist() == [7, 6]
    with torch.no_grad():
        expected, _ = model.encode_question(video, question, mask)
    memory, memory_mask = peer.encode_question(video, question, mask)
    seen = memory_mask[:, 0, 0]
    assert_close(memory[seen], expected[seen], rtol=1e-4, atol=1e-4)
    expected = model.generate(video, question_ids=question, question_mask=mask, num_beams=5, min_length=8, max_length=8)
    ids, scores = peer.decode(memory, 5, 8, 8, memory_mask)
    assert torch.equal(ids, expected.sequences[:, 0])
    assert_close(scores, expected.scores[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"width": 64}], ids=["tiny", "projected"])
def test_training(changes):
    config = TINY.replace(prompt="a video", **changes)
    model, peer, video = build(config)
    caption, mask = random_text(config, 2, 7)
    peer.model.requires_grad_(True)
    expected, loss = model(video, caption, mask), peer.loss(video, caption)
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    expected.backward()
    loss.backward()
    gradients = peer.model.official_gradients()
    largest = max(parameter.grad.norm() for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        # The gradient of a key's bias is rounding, because shifting all scores of a query changes nothing.
        if parameter.grad.norm() > 1e-6 * largest:
            assert relative(gradients[name], parameter.grad.double()) < 1e-4, name


def test_training_of_question_answering():
    model, peer, video = build(TINY, "answering")
    question, answer = random_text(TINY, 2, 7), random_text(TINY, 2, 5)
    ones = torch.ones(2, dtype=torch.long)
    with torch.no_grad():
        expected = model(video, *question, *answer, ones, ones.float())
        assert_close(peer.answer_loss(video, *question, answer[0]), expected, rtol=1e-5, atol=1e-5)


def test_dropout():
    """Peer and reference draw different numbers, so only the mean and the spread of their losses agree."""
    config = TINY.replace(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model, peer, video = build(config)
    caption, mask = random_text(config, 2, 7)
    torch.manual_seed(0)
    with torch.no_grad():
        peer.model.train(), model.train()
        found = torch.stack([peer.loss(video, caption) for _ in range(100)])
        expected = torch.stack([model(video, caption, mask) for _ in range(100)])
    assert abs(found.mean() - expected.mean()) < 4 * (expected.var() / 50).sqrt()
    assert 0.6 < found.std() / expected.std() < 1.6


@pytest.fixture
def unique_graphs():
    """The number of graphs compiled since the start of the test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_all_layers_of_a_kind_share_one_compilation(unique_graphs):
    """The backend traces and functionalises as torch.compile does, without generating code."""
    model, peer, video = build(TINY.replace(layers=10, text_decode_layers=10))
    peer.compile(backend="aot_eager")
    expected = model.generate(video, num_beams=5, min_length=4, max_length=4)
    with torch.no_grad():
        embeds = peer.encode_video(video)
    for _ in range(2):
        ids, scores = peer.decode(embeds, 5, 4, 4)
        assert torch.equal(ids, expected.sequences[:, 0])
        assert_close(scores, expected.scores[:, 0], rtol=1e-4, atol=1e-4)
    # Vision block, two shapes of universal layers, decoder layer, head with beam step.
    assert unique_graphs() == 5


def test_compilations_of_training(unique_graphs):
    config = TINY.replace(layers=10, text_decode_layers=10)
    _, peer, video = build(config)
    caption, _ = random_text(config, 2, 7)
    model = peer.model.requires_grad_(True)
    expected = peer.loss(video, caption)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    peer.compile(backend="aot_eager")
    loss = peer.loss(video, caption)
    loss.backward()
    assert_close(loss, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    # Vision block, two shapes of universal layers, decoder layer, head with loss.
    assert unique_graphs() == 5


@torch.no_grad()
def test_retrieval():
    config = MPlug2Config.preset("tiny").replace(vocab_size=300)
    model, fast = reference.MPlug2ForRetrieval(config).eval(), mf.MPlug2(config, ["retrieval"]).eval()
    for each in (model, fast):
        fill(each.official_parameters())
    peer, texts = Peer(fast), random_text(config, 5, 6)
    video = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    visual, states = model.encode_video(video), model.text_encoder(*texts)
    features = peer.retrieval_features(video, *texts)
    assert_close(features, (model.image_feature(visual), model.text_feature(states)), rtol=1e-4, atol=1e-4)
    alone = [model.match(each.expand(5, -1, -1), states, texts[1])[:, 1] for each in visual]
    assert_close(peer.match(visual, states, texts[1]), torch.stack(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"stride_layer": 6}, {"width": 64}], ids=["connected", "plain", "projected"])
@torch.no_grad()
def test_mplug(changes):
    config = mf.MPlugConfig.preset("tiny").replace(vocab_size=700, **changes)
    tasks = ["question_answering", "answer_ranking", "grounding", "retrieval"]
    model, fast = (library.MPlug(config, tasks).eval() for library in (reference, mf))
    for each in (model, fast):
        fill(each.official_parameters())
    peer = Peer(fast)
    image = torch.randn(2, 3, 1, 48, 48, generator=torch.Generator().manual_seed(3))
    question, texts = random_text(config, 2, 7), random_text(config, 5, 6, seed=1)
    visual, states = model.encode_video(image), model.text_encoder(*texts)
    memory = peer.encode_question(image, *question)
    expected = model.search(*model.memory(visual, *question), num_beams=3, min_length=6, max_length=6)
    ids, scores = peer.decode(memory[0], 3, 6, 6, memory[1])
    assert torch.equal(ids, expected.sequences[:, 0])
    assert_close(scores, expected.scores[:, 0], rtol=1e-4, atol=1e-4)
    assert_close(peer.ground(*memory), model.ground(visual, *question)[2], rtol=1e-4, atol=1e-4)
    indices, probabilities = model.rank_answers(visual, *question, *texts, 5)
    assert_close(peer.rank(*memory, texts[0]).gather(1, indices), probabilities.log(), rtol=1e-4, atol=1e-4)
    features = peer.retrieval_features(image, *texts)
    assert_close(features, (model.image_feature(visual), model.text_feature(states)), rtol=1e-4, atol=1e-4)
    alone = [model.match(each.expand(5, -1, -1), states, texts[1])[:, 1] for each in visual]
    assert_close(peer.match(visual, states, texts[1]), torch.stack(alone), rtol=1e-4, atol=1e-4)
