import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.errors import BackendError
from mplug2_fast.ops.linear_fp8 import DTYPE, SPEC, quantise_rows, quantise_weight
from mplug2_fast.ops.runtime import triton
from tests.ops.suite import TRITON_DEVICE, TRITON_DTYPES, OpSuite

# Every finite e4m3 number.
NUMBERS = torch.arange(256, dtype=torch.uint8).view(DTYPE).float()
NUMBERS = NUMBERS[NUMBERS.isfinite()].unique()


class TestSpecification(OpSuite):
    operator = ops.linear_fp8

    def test_never_falls_back(self):
        """On a CPU it is an error that says what to do."""
        given = SPEC.inputs(SPEC.edge_cases[0])
        if triton.INTERPRETED:
            pytest.skip("Triton serves the CPU")
        with pytest.raises(BackendError, match=r"compute capability 8\.9 or later: use int8 on a CPU"):
            ops.linear_fp8(given["x"], given["weight"], given["scale"])


def nearest(x: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 number of each, ties to the even mantissa, found by looking at all of them."""
    distance = (x.double()[..., None] - NUMBERS.double()).abs()
    least = distance.amin(dim=-1, keepdim=True)
    even = NUMBERS.to(DTYPE).view(torch.uint8) % 2 == 0
    at = torch.where((distance == least) & even, 2, (distance == least).int()).argmax(dim=-1)
    return NUMBERS[at]


def test_rows_become_the_nearest_numbers():
    torch.manual_seed(0)
    x = torch.randn(64, 100) * torch.logspace(-30, 30, 64)[:, None]
    x[:, :40] *= 1e-3
    numbers, scale = quantise_rows(x)
    assert (numbers.dtype, scale.dtype, scale.shape) == (DTYPE, torch.float32, (64, 1))
    assert torch.equal(numbers.float().abs().amax(dim=1), torch.full((64,), 448.0))
    factor = torch.full((64, 1), 448.0) / x.abs().amax(dim=1, keepdim=True)
    assert torch.equal(numbers.float(), nearest(x * factor))


def test_ties_become_even():
    x = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 2.0**-9, 0.0]])
    numbers, scale = quantise_rows(x)
    assert scale.item() == 1
    assert numbers.float().tolist() == [[448.0, 16.0, 20.0, -16.0, 0.0, 2.0**-8, 2.0**-9, 0.0]]


def test_weights_are_rounded_by_row():
    weight = torch.tensor([[1.0, -448.0, 0.3], [0.0, 0.0, 0.0], [0.875, 0.5, 0.4375]])
    numbers, scale = quantise_weight(weight)
    assert numbers.float().tolist() == [[1, -448, 0.3125], [0, 0, 0], [448, 256, 224]]
    assert scale.tolist() == [1, 0, 0.875 / 448]


@pytest.mark.parametrize("backend", ["torch", *(["triton"] if TRITON_DEVICE else [])])
@pytest.mark.parametrize("dtype", [torch.float32, *TRITON_DTYPES[1:]])
def test_rows_that_are_zero_or_not_finite(backend, dtype):
    given = SPEC.inputs({"rows": (5,), "inputs": 48, "outputs": 16, "bias": False}, dtype, TRITON_DEVICE or "cpu")
    given["x"][1] = 0
    given["x"][2, 3] = torch.inf
    given["x"][3, 39] = torch.nan
    if dtype == torch.float32:
        given["x"][4] *= 1e-40
    with ops.use_backend(backend):
        out = ops.linear_fp8(given["x"], given["weight"], given["scale"])
    assert out[[0, 4]].isfinite().all()
    assert (out[1] == 0).all()
    assert out[2:4].isnan().all()
    numbers, scale = quantise_rows(given["x"])
    assert numbers.float().isfinite().all()
    assert scale[2:4].isnan().all()


@pytest.mark.skipif(TRITON_DEVICE is None, reason="Triton neither runs nor is interpreted here")
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_triton_rounds_as_the_reference(dtype):
    """Bit for bit: the same numbers and the same scales."""
    torch.manual_seed(0)
    x = (torch.randn(37, 200) * torch.logspace(-3, 1, 37)[:, None]).to(TRITON_DEVICE, dtype)
    x[:, 7] *= 100
    numbers, scale = torch.empty_like(x, dtype=DTYPE), x.new_empty(37, dtype=torch.float32)
    triton.kernels("linear_fp8").quantise((x, (1, 37), (0, 200)), None, numbers, scale)
    expected, expected_scale = quantise_rows(x)
    assert torch.equal(numbers.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale[:, 0])


def test_relative_error_of_normal_numbers():
    """3 bits of mantissa on both sides: about 2.6% each."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 512), torch.randn(80, 512)
    with ops.use_backend("torch"):
        found = ops.linear_fp8(x, *quantise_weight(weight))
    exact = x.double() @ weight.double().t()
    error = ((found - exact).norm() / exact.norm()).item()
    assert 0.03 < error < 0.045


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.zeros(5, 6).to(DTYPE)}, ValueError, "in_features"),
        ({"weight": torch.zeros(5, 4)}, TypeError, "weight must be float8_e4m3fn"),
        ({"scale": torch.zeros(4)}, ValueError, r"scale must have shape \(5,\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5,\)"),
        ({"activation": "relu"}, ValueError, "activation is 'relu'"),
        ({"residual": torch.zeros(3, 4)}, ValueError, r"residual must have shape \(3, 5\)"),
        ({"norm_weight": torch.zeros(5)}, ValueError, r"weight must have shape \(4,\)"),
        ({"norm_bias": torch.zeros(4)}, ValueError, "norm_bias needs a norm_weight"),
    ],
)
def test_bad_arguments(changes, error, message):
    given = {"x": torch.randn(3, 4), "weight": torch.zeros(5, 4).to(DTYPE), "scale": torch.ones(5), **changes}
    with pytest.raises(error, match=message):
        ops.linear_fp8(**given)
