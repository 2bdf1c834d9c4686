import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.errors import BackendError
from mplug2_fast.ops.beam_step import length_penalty
from tests.ops.suite import TRITON_DEVICE, OpSuite, device

BACKENDS = ["cpu", "torch", *(["triton"] if TRITON_DEVICE else [])]


class TestSpecification(OpSuite):
    operator = ops.beam_step


def step(backend, logits, cumulative, step=0, min_length=0):
    """Runs the backend with token 2 as the end token. Results are on the CPU."""
    with ops.use_backend(backend):
        found = ops.beam_step(
            *(tensor.to(device(backend)) for tensor in (logits, cumulative)),
            step=step,
            min_length=min_length,
            end_token_id=2,
        )
    return tuple(tensor.cpu() for tensor in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_step_extends_the_first_beam_only(backend, serving):
    cumulative = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    _, _, origin, tokens = step(backend, torch.randn(1, 3, 20), cumulative)
    assert origin.tolist() == [[0, 0, 0]]
    assert len(set(tokens[0].tolist())) == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_leads_nowhere(backend, bad, serving):
    """Indices stay within beams and vocabulary, whatever the logits are."""
    _, _, origin, tokens = step(backend, torch.full((2, 3, 40), bad), torch.zeros(2, 3))
    assert 0 <= origin.min() <= origin.max() < 3
    assert 0 <= tokens.min() <= tokens.max() < 40


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "torch"])
def test_the_lowest_index_comes_first_among_equals(backend, serving):
    logits = torch.zeros(1, 3, 2100)
    logits[0, 0, 1] = -0.0
    scores, _, origin, tokens = step(backend, logits, torch.zeros(1, 3))
    assert origin.tolist() == [[0, 0, 0]]
    assert tokens.tolist() == [[0, 1, 2]]
    assert scores.unique().numel() == 1
    _, _, origin, tokens = step(backend, logits, torch.tensor([[-1.0, 0.0, 0.0]]), min_length=1)
    assert origin.tolist() == [[1, 1, 1]]
    assert tokens.tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_end_token_before_its_time_beats_the_impossible_only(backend, serving):
    logits = torch.full((1, 2, 1200), -torch.inf)
    logits[0, :, 2], logits[0, :, 1100] = 5.0, 1.0
    log_prob = torch.tensor([1.0, 5.0]).log_softmax(0)[0]
    scores, total, origin, tokens = step(backend, logits, torch.tensor([[0.0, -torch.inf]]), step=1, min_length=2)
    assert tokens.tolist() == [[1100, 2]]
    assert origin.tolist() == [[0, 0]]
    torch.testing.assert_close(total, torch.stack([log_prob, torch.tensor(-1e20)])[None])
    torch.testing.assert_close(scores, total / length_penalty(1))


@pytest.mark.skipif(TRITON_DEVICE is None, reason="Triton runs on a GPU or under its interpreter")
@pytest.mark.parametrize(("beams", "vocabulary", "what"), [(33, 40, "32 beams, got 33"), (2, 1 << 18, "131072 tokens")])
def test_what_triton_is_not_for(beams, vocabulary, what):
    logits = torch.zeros(1, beams, vocabulary, device=TRITON_DEVICE)
    with ops.use_backend("triton"), pytest.raises(BackendError, match=what):
        ops.beam_step(logits, logits[..., 0], step=0, min_length=0, end_token_id=2)


def test_length_penalty():
    assert length_penalty(0) == 1.0
    assert length_penalty(6) == pytest.approx(2**0.6)


def test_bad_arguments():
    logits, cumulative = torch.randn(2, 3, 8), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="end_token_id must be from 0 to 7, got 8"):
        ops.beam_step(logits, cumulative, step=0, min_length=0, end_token_id=8)
    with pytest.raises(ValueError, match="logits must be"):
        ops.beam_step(logits, cumulative[:, :2], step=0, min_length=0, end_token_id=2)
    with pytest.raises(TypeError, match="cumulative must be float32"):
        ops.beam_step(logits, cumulative.bfloat16(), step=0, min_length=0, end_token_id=2)
