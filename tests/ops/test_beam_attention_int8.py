import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.ops.beam_attention_int8 import SPEC
from mplug2_fast.ops.runtime import cpu
from tests.ops.suite import ALL_ISAS, OpSuite


class TestSpecification(OpSuite):
    operator = ops.beam_attention_int8
    isas = ALL_ISAS


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_sums_of_the_largest_numbers(native_module, monkeypatch, isa, dtype):
    """They do not overflow: 256 channels, and 64 tokens of equal weight."""
    monkeypatch.setattr(cpu, "isa", lambda: isa)
    query = torch.full((1, 7, 1, 256), 3.0, dtype=dtype)
    states = torch.full((1, 128, 1, 256), 2.0, dtype=dtype)
    states[:, 1::2] *= -1
    memory = ops.quantise_memory(states, states)
    out = ops.beam_attention_int8(query, *memory)
    torch.testing.assert_close(out, torch.full_like(out, 2.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_close_to_attention_without_rounding(dtype):
    torch.manual_seed(1)
    query = torch.randn(2, 5, 4, 64, dtype=dtype)
    key, value = (torch.randn(2, 300, 4, 64, dtype=dtype) for _ in range(2))
    exact = ops.beam_attention(query.float(), key.float().transpose(1, 2), value.float().transpose(1, 2))
    out = ops.beam_attention_int8(query, *ops.quantise_memory(key, value)).float()
    assert (out - exact).norm() < 0.015 * exact.norm()


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_padding_may_hold_anything(native_module, monkeypatch, isa, dtype):
    """Scales of padding are NaN; the second row sees no token, and only one token of the third is seen."""
    monkeypatch.setattr(cpu, "isa", lambda: isa)
    query = torch.randn(3, 5, 2, 16, dtype=dtype)
    states = torch.randn(3, 1300, 2, 16, dtype=dtype)
    mask = torch.ones(3, 1300, dtype=torch.uint8)
    mask[0, 40:], mask[1], mask[2], mask[2, 1200] = 0, 0, 0, 1
    states[~mask.bool()] = torch.nan
    out = ops.beam_attention_int8(query, *ops.quantise_memory(states, states), key_padding_mask=mask)
    short = ops.beam_attention_int8(query[:1], *ops.quantise_memory(states[:1, :40], states[:1, :40]))
    torch.testing.assert_close(out[:1], short)
    assert (out[1] == 0).all()
    alone = states[2, 1200].flatten().expand(5, -1)
    torch.testing.assert_close(out[2], alone, rtol=0, atol=states[2, 1200].abs().max().item() / 200)


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_what_is_not_finite_gives_nan(native_module, dtype):
    query, states = torch.randn(2, 3, 2, 16, dtype=dtype), torch.randn(2, 100, 2, 16, dtype=dtype)
    query[0, 1, 0, 5] = torch.inf
    states[1, 70, 1, 2] = torch.nan
    out = ops.beam_attention_int8(query, *ops.quantise_memory(states, states)).unflatten(-1, (2, 16))
    wrong = out.isnan().all(dim=-1)
    assert wrong.nonzero().tolist() == [[0, 1, 0], [1, 0, 1], [1, 1, 1], [1, 2, 1]]
    assert out[~wrong].isfinite().all()


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_a_query_does_not_depend_on_the_others(dtype):
    given = SPEC.inputs({"batch": 2, "queries": 15, "keys": 200, "head_dim": 64, "masked": True}, dtype)
    query, *memory = list(given.values())[:5]
    whole = ops.beam_attention_int8(query, *memory, key_padding_mask=given["key_padding_mask"])
    for row in (0, 7, 14):
        mask = given["key_padding_mask"][1:]
        alone = ops.beam_attention_int8(query[1:, row : row + 1], *(m[1:] for m in memory), key_padding_mask=mask)
        torch.testing.assert_close(alone[0, 0], whole[1, row], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("query", torch.zeros(2, 3, 4), ValueError, "query must be"),
        ("key", torch.zeros(1, 2, 2, 4, 16, 4), TypeError, "key and value must be int8"),
        ("key", torch.zeros(1, 2, 1, 4, 16, 4, dtype=torch.int8), ValueError, r"key must be \(1, 2, 2, 4, 16, 4\)"),
        ("value", torch.zeros(1, 2, 2, 4, 8, 4, dtype=torch.int8), ValueError, "value must be"),
        ("key_scale", torch.zeros(1, 2, 20).double(), TypeError, "scales must be float32"),
        ("value_scale", torch.zeros(1, 2, 19), ValueError, "key_scale and value_scale must be"),
        ("key_padding_mask", torch.ones(1, 19), ValueError, "key_padding_mask must be"),
    ],
)
def test_bad_arguments(name, value, error, message):
    given = SPEC.inputs({"batch": 1, "queries": 3, "keys": 20})
    with pytest.raises(error, match=message):
        ops.beam_attention_int8(**{**given, name: value})
