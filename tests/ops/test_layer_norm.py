import pytest
import torch

from mplug2_fast import ops
from tests.ops.suite import DifferentiableOpSuite


class TestSpecification(DifferentiableOpSuite):
    operator = ops.layer_norm


def test_parameters_of_another_type():
    """Dtypes as under autocast: bfloat16 activations, float32 parameters."""
    x, weight, bias = torch.randn(3, 16).bfloat16(), torch.randn(16), torch.randn(16)
    out = ops.layer_norm(x, weight, bias)
    assert out.dtype == torch.bfloat16
    expected = torch.nn.functional.layer_norm(x.float(), (16,), weight, bias)
    torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=1e-2)


def test_large_offsets_cost_no_accuracy(native_module):
    x = torch.randn(4, 256) + 1000
    exact = torch.nn.functional.layer_norm(x.double(), (256,))
    torch.testing.assert_close(ops.layer_norm(x).double(), exact, atol=2e-4, rtol=0)


@pytest.mark.parametrize("channels", [64, 256, 1024])
@pytest.mark.parametrize("outliers", [1, 16, 64])
@pytest.mark.parametrize("size", [10.0, 1e3, 1e6])
def test_first_channels_far_from_the_mean_cost_no_accuracy(channels, outliers, size, native_module):
    """The kernel takes sums relative to the mean of the first channels."""
    x = torch.randn(16, channels)
    x[:, :outliers] += size
    exact = torch.nn.functional.layer_norm(x.double(), (channels,))
    error, eager = (
        (norm(x, (channels,)).double() - exact).abs().max()
        for norm in (lambda x, _: ops.layer_norm(x), torch.nn.functional.layer_norm)
    )
    assert error <= 2 * eager + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_squares_overflow_become_zero(dtype, native_module):
    x = torch.randn(3, 128).mul(1e20).to(dtype)
    assert ops.layer_norm(x).abs().max() == 0


@pytest.mark.parametrize("channels", [1, 63, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1.0, 300.0])
def test_a_row_of_equal_values_is_next_to_zero(channels, dtype, value, native_module):
    assert ops.layer_norm(torch.full((3, channels), value, dtype=dtype)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [((), (1,), "channels in its last axis"), ((3, 0), (1,), "weight"), ((3, 4), (5,), "weight")],
)
def test_shapes_that_do_not_go_together(x, weight, message):
    with pytest.raises(ValueError, match=message):
        ops.layer_norm(torch.randn(x), torch.randn(weight))
