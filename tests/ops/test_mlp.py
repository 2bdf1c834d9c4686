import sys

import pytest
import torch
from torch.nn import functional as F

from mplug2_fast.ops.mlp import mlp
from tests.tolerance import assert_three_way

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(
    x, fc_weight, fc_bias, proj_weight, proj_bias, norm_weight=None, norm_bias=None, *, activation, residual=True
):
    h = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    h = F.linear(h, fc_weight, fc_bias)
    h = {"quick_gelu": lambda z: z * torch.sigmoid(1.702 * z), "gelu": F.gelu, "none": lambda z: z}[activation](h)
    out = F.linear(h, proj_weight, proj_bias)
    return x + out if residual else out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "none"])
@pytest.mark.parametrize(("norm", "residual"), [(True, True), (False, True), (False, False), (True, False)])
@pytest.mark.parametrize("shape", [(3, 5, 12), (1, 12), (0, 12)])
def test_against_float64(shape, norm, residual, activation, dtype, monkeypatch):
    monkeypatch.setattr(
        sys.modules["mplug2_fast.ops.mlp"], "_BLOCK_BYTES", 4 * 40 * 4
    )  # several blocks, the last one shorter
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(shape),
        "fc_weight": torch.randn(40, 12) / 3,
        "fc_bias": torch.randn(40),
        "proj_weight": torch.randn(12, 40) / 6,
        "proj_bias": torch.randn(12),
    }
    if norm:
        inputs |= {"norm_weight": torch.randn(12), "norm_bias": torch.randn(12)}
    options = {"activation": activation, "residual": residual}
    assert_three_way(lambda **i: mlp(**i, **options), lambda **i: eager(**i, **options), inputs, dtype)


def test_the_input_is_left_alone():
    x = torch.randn(4, 12)
    before = x.clone()
    parameters = torch.randn(40, 12), torch.randn(40), torch.randn(12, 40), torch.randn(12)
    out = mlp(x, *parameters, activation="quick_gelu")
    assert torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr()
