import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.ops.quantise_memory import unpack
from mplug2_fast.ops.runtime import cpu
from tests.ops.suite import OpSuite


class TestSpecification(OpSuite):
    operator = ops.quantise_memory


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("head_dim", [64, 22])
def test_what_the_bytes_stand_for(dtype, head_dim):
    key, value = (torch.randn(2, 37, 3, head_dim, dtype=dtype) for _ in range(2))
    rounded = unpack(*ops.quantise_memory(key, value))
    for states, found in zip((key, value), rounded, strict=True):
        states = states.float().transpose(1, 2)
        assert found.shape == states.shape
        assert ((found - states).abs() <= states.abs().amax(dim=-1, keepdim=True) / 253).all()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_heads_that_are_zero_or_not_finite(native_module, dtype, backend):
    key, value = (torch.randn(1, 5, 2, 20, dtype=dtype) for _ in range(2))
    key[0, 1, 0] = 0
    key[0, 2, 1, 3] = torch.inf
    value[0, 3, 0, 19] = torch.nan
    with ops.use_backend(backend):
        _, key_scale, _, value_scale = results = ops.quantise_memory(key, value)
    assert key_scale[0, 0, 1] == 0
    assert key_scale.isnan().nonzero().tolist() == [[0, 1, 2]]
    assert value_scale.isnan().nonzero().tolist() == [[0, 0, 3]]
    keys, _ = unpack(*results)
    assert (keys[0, 0, 1] == 0).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (torch.ones(1, 2, 3), torch.ones(1, 2, 3)),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5)),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4).bfloat16()),
    ],
)
def test_bad_arguments(key, value):
    with pytest.raises(ValueError, match="key and value must be"):
        ops.quantise_memory(key, value)
