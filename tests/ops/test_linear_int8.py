import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.ops.linear_int8 import BITS, OP, SPEC, quantise_rows, quantise_weight
from mplug2_fast.ops.runtime import cpu
from tests.ops.suite import ALL_ISAS, OpSuite


class TestSpecification(OpSuite):
    operator = ops.linear_int8
    isas = ALL_ISAS


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(7, 40, 50), (70, 513, 130), (1, 4096, 3)])
def test_sums_of_the_largest_numbers(native_module, monkeypatch, isa, bits, rows, inputs, outputs):
    """They do not overflow. With 8 bits they are exact; with 16 bits exact parts are added in float32."""
    monkeypatch.setattr(cpu, "isa", lambda: isa)
    generator = torch.Generator().manual_seed(3)
    low, high = (-100, 155) if bits == 8 else (-32767, 32767)
    x = torch.randint(low, high + 1, (rows, inputs), generator=generator).float()
    x[:, 0], x[:, 1] = low, high
    weight = torch.full((outputs, inputs), 127, dtype=torch.int8)
    weight[1:] = torch.randint(-127, 128, weight[1:].shape, generator=generator)
    out = ops.linear_int8(x, weight, torch.full((outputs,), 2.0**-20), bits=bits)
    exact = (x.double() @ weight.double().t() * 2.0**-20).float()
    torch.testing.assert_close(out, exact, rtol=3e-7, atol=0 if bits == 8 else 1e-6 * exact.abs().max().item())


def test_weights_are_rounded_by_row():
    weight = torch.tensor([[1.0, -127.0, 0.4], [0.0, 0.0, 0.0], [2.54, 0.01, -1.27]])
    numbers, scale = quantise_weight(weight)
    assert numbers.tolist() == [[1, -127, 0], [0, 0, 0], [127, 0, -64]]  # -63.5 becomes the even -64
    assert scale.tolist() == pytest.approx([1.0, 0.0, 0.02])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_rows_that_are_zero_or_not_finite(dtype, bits):
    given = SPEC.inputs({"rows": (4,), "inputs": 40, "outputs": 5, "bias": False, "bits": bits}, dtype)
    given["x"][1] = 0
    given["x"][2, 3] = torch.inf
    given["x"][3, 39] = torch.nan
    out = ops.linear_int8(given["x"], given["weight"], given["scale"], bits=bits)
    assert out[0].isfinite().all()
    assert (out[1] == 0).all()
    assert out[2:].isnan().all()
    numbers, scale = quantise_rows(given["x"], bits)
    assert numbers.isfinite().all()
    assert scale[2:].isnan().all()


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_rows_from_minus_to_plus_a_number(native_module, monkeypatch, isa, dtype):
    """Their zero is halfway between two whole numbers, so the least number must be rounded as the zero is."""
    monkeypatch.setattr(cpu, "isa", lambda: isa)
    given = SPEC.inputs({"rows": (500,), "inputs": 136, "outputs": 20, "bias": False}, dtype)
    given["x"][:, 17] = -given["x"].abs().amax(dim=1)
    given["x"][:, 30] = -given["x"][:, 17]
    out, exact = OP(*given.values()), SPEC.reference(**given)
    torch.testing.assert_close(out, exact, rtol=1e-2, atol=1e-2 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_does_not_depend_on_the_others(bits):
    given = SPEC.inputs({"rows": (150,), "inputs": 72, "outputs": 80, "activation": "gelu", "bits": bits})
    whole = ops.linear_int8(*list(given.values())[:5], bits=bits)
    for row in (0, 70, 149):
        alone = ops.linear_int8(given["x"][row], *list(given.values())[1:5], bits=bits)
        torch.testing.assert_close(alone, whole[row], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.zeros(5, 6, dtype=torch.int8)}, ValueError, "in_features"),
        ({"weight": torch.zeros(5, 4)}, TypeError, "weight must be int8"),
        ({"scale": torch.zeros(4)}, ValueError, r"scale must have shape \(5,\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5,\)"),
        ({"activation": "relu"}, ValueError, "activation is 'relu'"),
        ({"residual": torch.zeros(3, 4)}, ValueError, r"residual must have shape \(3, 5\)"),
        ({"bits": 4}, ValueError, "bits must be 8 or 16"),
    ],
)
def test_bad_arguments(changes, error, message):
    given = {"x": torch.randn(3, 4), "weight": torch.zeros(5, 4, dtype=torch.int8), "scale": torch.ones(5), **changes}
    with pytest.raises(error, match=message):
        ops.linear_int8(**given)
