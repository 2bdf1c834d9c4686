"""Modules with e4m3 weights, computed by PyTorch's operators."""

import copy

import pytest
import torch
from torch import nn

from mplug2_fast import ops
from mplug2_fast.nn import TemporalBlock
from mplug2_fast.nn.fp8 import Fp8Linear
from mplug2_fast.nn.quantise import quantise
from tests.nn.test_int8 import MODULES, randomised, relative


@pytest.fixture(autouse=True)
def on_pytorch():
    with torch.no_grad(), ops.use_backend("torch"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_close_to_the_wide_module(name, dtype):
    torch.manual_seed(0)
    build, shape, count = MODULES[name]
    wide = randomised(build())
    quantised = copy.deepcopy(wide)
    assert len(quantise(quantised, kind=Fp8Linear)) == count
    assert sum(isinstance(each, Fp8Linear) for each in quantised.modules()) == count
    x = torch.randn(shape)
    expected, found = wide(x), quantised.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert 0.001 < relative(found.float(), expected) < 0.06


def test_norms_activations_and_residuals_are_fused(monkeypatch):
    """A block called layer by layer gives the same, and its norms are part of four products."""
    torch.manual_seed(0)
    module = randomised(TemporalBlock(64, 4))
    quantise(module, kind=Fp8Linear)
    x, fused = torch.randn(2, 3, 9, 64), []
    original = ops.linear_fp8

    def watched(*arguments, **options):
        fused.append("norm_weight" in options)
        return original(*arguments, **options)

    monkeypatch.setattr("mplug2_fast.nn.fp8.linear_fp8", watched)
    expected = module(x)
    assert (len(fused), sum(fused)) == (8, 4)
    calls = []
    for layer in list(module.modules()):
        if isinstance(layer, (Fp8Linear, nn.LayerNorm)):
            layer.register_forward_hook(lambda *_: calls.append(1))
    fused.clear()
    assert relative(module(x), expected) < 0.01
    assert (len(fused), sum(fused), len(calls)) == (8, 0, 12)


def test_padding_goes_through_the_norm_first():
    torch.manual_seed(0)
    block = randomised(TemporalBlock(64, 4))
    x, mask = torch.randn(2, 9, 64), torch.ones(2, 9)
    mask[:, 6:] = 0
    for module in (block.attn, quantised_attention(block.attn)):
        expected = module(block.ln_1(x), key_padding_mask=mask)
        torch.testing.assert_close(module(x, key_padding_mask=mask, norm=block.ln_1), expected)
        torch.testing.assert_close(module(x, norm=block.ln_1), module(block.ln_1(x)), rtol=1e-2, atol=1e-2)


def quantised_attention(attention):
    other = copy.deepcopy(attention)
    quantise(other, kind=Fp8Linear)
    return other
