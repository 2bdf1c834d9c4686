import pytest
import torch

from mplug2_fast import ops
from tests.ops.suite import TRITON_DEVICE, OpSuite, device


class TestSpecification(OpSuite):
    operator = ops.step_attention


@pytest.mark.parametrize("backend", ["cpu", "torch", *(["triton"] if TRITON_DEVICE else [])])
def test_the_new_states_are_kept_and_nothing_else_is_written(backend):
    given = ops.step_attention.op.spec.inputs({"rows": 5, "length": 7, "step": 3}, device=device(backend))
    before = {name: given[name].clone() for name in ("keys", "values", "ancestors")}
    with ops.use_backend(backend):
        ops.step_attention(**given)
    for name, new in (("keys", "key"), ("values", "value")):
        before[name][:, :, 3] = given[new]
        assert torch.equal(given[name], before[name])
    before["ancestors"][:, 3] = torch.arange(5)
    assert torch.equal(given["ancestors"], before["ancestors"])


def test_bad_arguments():
    given = ops.step_attention.op.spec.inputs({"rows": 5, "length": 7, "step": 3})
    for name, change, error in (
        ("key", lambda t: t[:2], "query, key and value"),
        ("keys", lambda t: t[:, :1], "keys and values"),
        ("ancestors", lambda t: t[:, :3], "ancestors must be"),
    ):
        with pytest.raises(ValueError, match=error):
            ops.step_attention(**{**given, name: change(given[name])})
    with pytest.raises(ValueError, match="step must be from 0 to 6, got 7"):
        ops.step_attention(**{**given, "step": 7})
    with pytest.raises(TypeError, match="int32"):
        ops.step_attention(**{**given, "ancestors": given["ancestors"].long()})
