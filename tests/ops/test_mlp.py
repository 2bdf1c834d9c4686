import sys

import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.ops.mlp import SPEC
from mplug2_fast.ops.runtime import triton
from tests.ops.suite import TRITON_DEVICE, DifferentiableOpSuite


class TestSpecification(DifferentiableOpSuite):
    operator = ops.mlp

    @pytest.fixture(autouse=True)
    def _several_blocks(self, monkeypatch):
        """Several blocks, the last one shorter."""
        monkeypatch.setattr(sys.modules["mplug2_fast.ops.mlp"], "_BLOCK_BYTES", 4 * 40 * 4)


def test_the_input_is_left_alone():
    x = torch.randn(80, 12)
    before = x.clone()
    parameters = torch.randn(40, 12), torch.randn(40), torch.randn(12, 40), torch.randn(12)
    out = ops.mlp(x, *parameters, activation="quick_gelu")
    assert torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr()


def test_shapes_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"proj_weight must have shape \(12, 40\)"):
        ops.mlp(torch.randn(3, 12), torch.randn(40, 12), None, torch.randn(40, 12), None, activation="gelu")


def given(**changes):
    """Arguments for the operator."""
    made = {"rows": (2, 9), "channels": 24, "hidden": 40, **changes}
    return SPEC.inputs(made, device=TRITON_DEVICE or "cpu")


def gradients(arguments, backend, wanted):
    with ops.use_backend(backend):
        out = ops.mlp.op(*arguments.values())
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return torch.autograd.grad(out, [arguments[name] for name in wanted], direction)


@pytest.mark.skipif(TRITON_DEVICE is None, reason="no GPU, and Triton does not interpret")
class TestTriton:
    @pytest.mark.parametrize("normed", [True, False])
    @pytest.mark.parametrize("activation", ["none", "gelu"])
    def test_triton_gradients_of_some_arguments_alone(self, activation, normed):
        """The other parameters are frozen."""
        for wanted in (*([name] for name in SPEC.differentiable), ["x", "norm_bias"], ["fc_bias", "proj_weight"]):
            arguments = given(activation=activation, normed=normed)
            wanted = [name for name in wanted if arguments[name] is not None]
            for name in wanted:
                arguments[name].requires_grad_()
            found = [gradients(arguments, backend, wanted) for backend in ("triton", "reference")] if wanted else []
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)

    def test_triton_saves_one_tensor(self):
        """The hidden channels before their activation."""
        arguments = given()
        arguments["x"].requires_grad_()
        kept = []
        with ops.use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
            ops.mlp.op(*arguments.values())
        given_ones = {a.data_ptr() for a in arguments.values() if isinstance(a, torch.Tensor)}
        assert [t.shape for t in kept if t is not None and t.data_ptr() not in given_ones] == [(2, 9, 40)]


@pytest.mark.parametrize(
    ("dtype", "activation", "residual", "expected"),
    [
        (torch.bfloat16, "gelu", False, None),
        (torch.bfloat16, "none", True, None),
        (torch.bfloat16, "none", False, "there is nothing to fuse"),
        (torch.float32, "gelu", True, "float32 without TF32"),
    ],
)
def test_where_neither_product_gains_pytorch_is_preferred(dtype, activation, residual, expected):
    pytest.importorskip("triton")
    if triton.INTERPRETED:
        pytest.skip("nothing is known to be faster under the interpreter")
    sizes = {"rows": (4,), "channels": 8, "hidden": 16, "activation": activation, "residual": residual}
    why = ops.mlp.op.backends["triton"].slower_reasons(False, SPEC.arguments(**SPEC.inputs(sizes, dtype)))
    assert [reason[: len(expected)] for reason in why] == [expected] if expected else why == []
