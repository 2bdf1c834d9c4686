import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.ops.add_layer_norm import SPEC
from tests.ops.suite import DifferentiableOpSuite
from tests.tolerance import assert_close_enough


class TestSpecification(DifferentiableOpSuite):
    operator = ops.add_layer_norm


def test_both_orders():
    x, update, weight = torch.randn(2, 5, 12), torch.randn(2, 5, 12), torch.randn(12)
    normed, total = ops.add_layer_norm(x, update, weight, scale=0.5, return_sum=True)
    torch.testing.assert_close(total, x + 0.5 * update)
    torch.testing.assert_close(normed, ops.layer_norm(total, weight))
    assert torch.equal(ops.add_layer_norm(x, update, weight, scale=0.5), normed)


def test_rows_of_different_strides():
    wide = torch.randn(2, 3, 5, 24)
    x, update = wide[:, :, 1:, :12], torch.randn(2, 4, 3, 12).transpose(1, 2)
    torch.testing.assert_close(ops.add_layer_norm(x, update), ops.layer_norm(x + update))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="update must have the shape of x"):
        ops.add_layer_norm(torch.randn(2, 5, 12), torch.randn(5, 12))


@pytest.mark.parametrize("channels", [1024, 1023])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_that_go_past_the_caches(channels, dtype):
    """4 MB and more, where rows begin on lines of the cache, and where they do not."""
    given = SPEC.inputs({"rows": (2100,), "channels": channels}, dtype)
    eager, exact = SPEC.reference(**given), SPEC.reference(**given, upcast=True)
    for ours, one, true in zip(ops.add_layer_norm.op(*given.values()), eager, exact, strict=True):
        assert_close_enough(ours, one, true, SPEC.noise_floor[dtype], "forward")


def test_an_update_is_needed():
    with pytest.raises(TypeError, match="update must be a tensor of x's shape, got None"):
        ops.add_layer_norm(torch.randn(3, 8), None)
