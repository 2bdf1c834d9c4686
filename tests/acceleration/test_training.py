"""Training with accelerated modules equals training without them."""

import pytest
import torch

import mplug2_fast as mf
from tests.golden.cases import relative_error
from tests.tiny import SMALL, pair, random_text, random_video


def train(model, steps=5):
    """Trains the model for a few steps and returns the losses."""
    video = random_video(SMALL, 3)
    ids, mask = random_text(SMALL, 3, 7)
    # The gradients of keys' biases are rounding alone, which Adam would blow up with a smaller eps.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(video, ids, mask)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_five_steps():
    plain, fast = (pair(SMALL, scale=1.0)[0] for _ in range(2))
    mf.accelerate(fast)
    assert train(fast) == pytest.approx(train(plain), abs=1e-4)
    for (name, actual), expected in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(actual, expected) < 1e-4, name
    mf.restore(fast)
    fast.eval()
    video = random_video(SMALL, 2, seed=1)
    assert relative_error(fast.encode_video(video), plain.eval().encode_video(video)) < 1e-4


def test_generation_between_steps():
    """A training step drops the keys and values of earlier calls."""
    model = pair(SMALL, scale=2.0)[0]
    video = random_video(SMALL, 2)
    mf.accelerate(model)
    model.generate(video)
    train(model, steps=1)
    model.eval()
    found = model.generate(video)
    mf.restore(model)
    expected = model.generate(video)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)


def test_dropout_drops():
    config = SMALL.replace(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = pair(config)[0].train()
    mf.accelerate(model)
    video = random_video(config, 1)
    first, second = (model.encode_video(video) for _ in range(2))
    assert relative_error(first, second) > 0.1
    first.sum().backward()
    assert all(p.grad is not None for p in model.text_encoder.parameters())
    model.eval()
    assert torch.equal(model.encode_video(video), model.encode_video(video))


@pytest.mark.parametrize("where", ["", "attention.self.", "crossattention.output.", "layer.1.output."])
def test_only_dropout_in_training_mode(where):
    """Monte Carlo dropout: every call draws new random numbers for all tokens."""
    config = SMALL.replace(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = pair(config)[0]
    mf.accelerate(model)
    for name, module in model.text_decoder.named_modules():
        module.training = name.endswith(f"{where}dropout")
    ids, mask = random_text(config, 2, 6, padded=False)
    memory = torch.randn(2, 9, config.text.hidden_size)
    with torch.no_grad():
        first = model.text_decoder(ids[:, :5], mask[:, :5], memory, None)
        second = model.text_decoder(ids, mask, memory, None)
    assert relative_error(second[:, :5], first) > 0.1


def test_autocast():
    model, video = pair(SMALL)[0], random_video(SMALL, 2)
    with torch.no_grad():
        exact = model.encode_video(video)
        with torch.autocast("cpu", torch.bfloat16):
            plain = model.encode_video(video)
            mf.accelerate(model)
            fast = model.encode_video(video)
    assert fast.dtype is plain.dtype
    assert relative_error(fast, exact) < 2 * relative_error(plain, exact) + 1e-3
