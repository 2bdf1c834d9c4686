"""Products in a narrow type, on a processor that has no instructions for it."""

import sys

import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.ops.runtime import onednn
from tests.ops.suite import label
from tests.tolerance import assert_close_enough

BLOCKS = {
    "linear_act": {"rows": (3, 401), "inputs": 20, "outputs": 31, "activation": "quick_gelu", "residual": True},
    "mlp": {"rows": (3, 401), "channels": 20, "hidden": 48},
    "local_temporal": {"batch": 3, "frames": 4, "patches": 9, "channels": 32, "inner": 16},
}
"""Sizes of several blocks."""
CASES = [(name, sizes) for name, more in BLOCKS.items() for sizes in (*ops.OPERATORS[name].op.spec.edge_cases, more)]


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=label)
def test_computed_in_float32(name, sizes, monkeypatch, native_module):
    monkeypatch.setattr(onednn, "multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(sys.modules["mplug2_fast.ops.linear_act"], "_has_fast_native_products", lambda: False)
    op, products = ops.OPERATORS[name].op, []
    linear = onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda x, *a, **k: products.append(x.dtype) or linear(x, *a, **k))
    given = op.spec.inputs(sizes, torch.bfloat16)
    with torch.no_grad(), ops.use_backend("cpu"):
        ours = op(*given.values())
    assert ours.dtype == torch.bfloat16
    assert ours.is_contiguous()
    assert set(products) <= {torch.float32}
    assert products or sizes is not BLOCKS[name]
    eager, exact = op.spec.reference(**given), op.spec.reference(**given, upcast=True)
    assert_close_enough(ours, eager, exact, op.spec.noise_floor[torch.bfloat16], "forward")


@pytest.mark.parametrize("packs", [False, True])
def test_a_prime_number_of_rows(packs, monkeypatch):
    monkeypatch.setattr(onednn, "pays", lambda weight, rows: True)
    x, weight, bias = torch.randn(1, 577, 20), torch.randn(30, 20), torch.randn(30)
    residual = torch.randn(1, 577, 30)
    if packs:
        onednn.pack(weight, 577)
    exact = torch.nn.functional.linear(x, weight, bias)
    for out, expected in (
        (onednn.linear(x, weight, bias), exact),
        (onednn.linear(x, weight, bias, "gelu"), torch.nn.functional.gelu(exact)),
        (onednn.linear(x, weight, bias, residual=residual), residual + exact),
    ):
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_widened_is_not_packed(monkeypatch, native_module):
    monkeypatch.setattr(onednn, "multiplies", lambda dtype: dtype == torch.float32)
    narrow, wide = torch.randn(48, 32, dtype=torch.bfloat16), torch.randn(48, 32)
    for weight in (narrow, wide):
        onednn.pack(weight, 80)
    assert not onednn.is_packed(narrow)
    assert onednn.is_packed(wide)
    wide.data = narrow  # which is computed in float32 from now on
    assert onednn.packed(wide) is None
