import pytest
import torch

from mplug2_fast.ops.beam_step import beam_step, length_penalty


def eager(logits, cumulative, step, min_length, end):
    log_probs = logits.double().log_softmax(dim=-1)
    if step < min_length:
        log_probs[..., end] = -1e20
    penalty = ((5 + step + 1) / 6) ** 0.6
    scores, picks = ((cumulative.double()[..., None] + log_probs) / penalty).flatten(1).topk(logits.shape[1])
    return scores, scores * penalty, picks // logits.shape[2], picks % logits.shape[2]


@pytest.mark.parametrize(("beams", "vocabulary"), [(1, 11), (5, 300), (10, 10), (5, 3)])
@pytest.mark.parametrize(("step", "min_length"), [(0, 0), (1, 4), (7, 4)])
def test_against_all_beams_times_all_words(beams, vocabulary, step, min_length):
    generator = torch.Generator().manual_seed(beams + step)
    logits = 3 * torch.randn(4, beams, vocabulary, generator=generator)
    logits[..., 2] += 4.0
    cumulative = -torch.rand(4, beams, generator=generator)
    ours = beam_step(logits.clone(), cumulative, step=step, min_length=min_length, end_token_id=2)
    for actual, expected in zip(ours, eager(logits, cumulative, step, min_length, 2), strict=True):
        torch.testing.assert_close(actual, expected.to(actual.dtype), atol=1e-4, rtol=1e-5)


def test_the_first_step_extends_the_first_beam_only():
    cumulative = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    _, _, origin, tokens = beam_step(torch.randn(1, 3, 20), cumulative, step=0, min_length=0, end_token_id=2)
    assert origin.tolist() == [[0, 0, 0]]
    assert len(set(tokens[0].tolist())) == 3


def test_length_penalty():
    assert length_penalty(0) == 1.0
    assert length_penalty(6) == pytest.approx(2**0.6)
