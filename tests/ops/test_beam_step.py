import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.ops.beam_step import length_penalty
from tests.ops.suite import OpSuite


class TestSpecification(OpSuite):
    operator = ops.beam_step


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_first_step_extends_the_first_beam_only(backend, native_module):
    cumulative = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    with ops.use_backend(backend):
        _, _, origin, tokens = ops.beam_step(torch.randn(1, 3, 20), cumulative, step=0, min_length=0, end_token_id=2)
    assert origin.tolist() == [[0, 0, 0]]
    assert len(set(tokens[0].tolist())) == 3


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_what_is_not_a_number_leads_nowhere(backend, native_module):
    """Indices stay within beams and words, whatever the logits are."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits = torch.full((2, 3, 40), bad)
        with ops.use_backend(backend):
            _, _, origin, tokens = ops.beam_step(logits, torch.zeros(2, 3), step=0, min_length=0, end_token_id=2)
        assert 0 <= origin.min() <= origin.max() < 3
        assert 0 <= tokens.min() <= tokens.max() < 40


def test_length_penalty():
    assert length_penalty(0) == 1.0
    assert length_penalty(6) == pytest.approx(2**0.6)


def test_bad_arguments():
    logits, cumulative = torch.randn(2, 3, 8), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="end_token_id 8 is not a word"):
        ops.beam_step(logits, cumulative, step=0, min_length=0, end_token_id=8)
    with pytest.raises(ValueError, match="logits must be"):
        ops.beam_step(logits, cumulative[:, :2], step=0, min_length=0, end_token_id=2)
    with pytest.raises(TypeError, match="cumulative must be float32"):
        ops.beam_step(logits, cumulative.bfloat16(), step=0, min_length=0, end_token_id=2)
