import pytest
import torch

from mplug2_fast import ops
from tests.ops.suite import TRITON_DEVICE, OpSuite, device

BACKENDS = ["torch", *(["triton"] if TRITON_DEVICE else [])]


class TestSpecification(OpSuite):
    operator = ops.beam_update


def update(backend, tokens, scores, best_score=-torch.inf, done=False, last=False):
    """The state of one video with three beams after a first token; `kept` is 2, the second empty."""
    given = {
        "scores": torch.tensor([scores]),
        "origin": torch.tensor([[0, 0, 1]]),
        "tokens": torch.tensor([tokens]),
        "sequences": torch.tensor([[[9, 10, -1], [9, 11, -1], [9, 12, -1]]]),
        "done": torch.tensor([done]),
        "best_sequences": torch.tensor([[[9, 2, -1], [-1, -1, -1]]]),
        "best_scores": torch.tensor([[best_score, -torch.inf]]),
    }
    with ops.use_backend(backend):
        found = ops.beam_update(
            *(tensor.to(device(backend)) for tensor in given.values()), step=1, last=last, end_token_id=2
        )
    return [tensor.cpu().tolist()[0] for tensor in found]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_beam_that_ends_is_stored_and_goes_on(backend):
    sequences, done, best, scores = update(backend, [7, 2, 8], [-1.0, -2.0, -3.0])
    assert sequences == [[9, 10, 7], [9, 10, 2], [9, 11, 8]]
    assert not done
    assert best[0] == [9, 10, 2]
    assert scores == [-2.0, -torch.inf]


@pytest.mark.parametrize("backend", BACKENDS)
def test_when_the_best_beam_ends_all_are_stored(backend):
    _, done, best, scores = update(backend, [2, 7, 8], [-1.0, -2.0, -3.0], best_score=-1.5)
    assert done
    assert best == [[9, 10, 2], [9, 2, -1]]
    assert scores == [-1.0, -1.5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_the_last_step_all_are_stored(backend):
    _, done, best, scores = update(backend, [6, 7, 8], [-1.0, -2.0, -3.0], last=True)
    assert done
    assert best == [[9, 10, 6], [9, 10, 7]]
    assert scores == [-1.0, -2.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_done_stays(backend):
    _, done, best, scores = update(backend, [2, 2, 2], [-1.0, -2.0, -3.0], best_score=-5.0, done=True, last=True)
    assert done
    assert best[0] == [9, 2, -1]
    assert scores == [-5.0, -torch.inf]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_older_hypothesis_comes_first_among_equals(backend):
    _, _, best, _ = update(backend, [2, 2, 2], [-1.0, -1.0, -1.0], best_score=-1.0)
    assert best == [[9, 2, -1], [9, 10, 2]]


@pytest.mark.parametrize(
    ("name", "shape", "words"), [("done", (3,), "done \\(batch,\\)"), ("best_scores", (2, 3), "\\(2, 3\\)")]
)
def test_shapes_that_do_not_go_together(name, shape, words):
    spec = ops.beam_update.op.spec
    given = spec.inputs({"batch": 2, "beams": 3, "kept": 1, "length": 5})
    given[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=words):
        ops.beam_update(**given)


def test_no_position_for_the_tokens():
    given = ops.beam_update.op.spec.inputs({"batch": 2, "beams": 3, "kept": 1, "length": 5, "step": 4})
    with pytest.raises(ValueError, match="no position for the tokens of step 4"):
        ops.beam_update(**given)
