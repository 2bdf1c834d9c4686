import pytest
import torch
from torch.nn import functional as F

from mplug2_fast.ops.local_temporal import local_temporal, temporal_conv
from tests.tolerance import assert_three_way

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(x, norm_weight, norm_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias):
    """The released form: patches only, Conv3d over (channels, frames, height, width)."""
    patches = x[:, :, 1:]
    h = F.linear(F.layer_norm(patches, x.shape[-1:], norm_weight, norm_bias), down_weight, down_bias)
    h = h.permute(0, 3, 1, 2)[..., None]
    kernel = conv_weight.shape[1]
    h = F.conv3d(h, conv_weight[:, None, :, None, None], conv_bias, padding=(kernel // 2, 0, 0), groups=h.shape[1])
    h = h[..., 0].permute(0, 2, 3, 1)
    h = F.linear(h * torch.sigmoid(1.702 * h), up_weight, up_bias)
    return torch.cat([x[:, :, :1], patches + h], dim=2)


def inputs(batch, frames, patches, channels, inner, kernel):
    torch.manual_seed(0)
    return {
        "x": torch.randn(batch, frames, 1 + patches, channels),
        "norm_weight": torch.randn(channels),
        "norm_bias": torch.randn(channels),
        "down_weight": torch.randn(inner, channels) / channels**0.5,
        "down_bias": torch.randn(inner),
        "conv_weight": torch.randn(inner, kernel),
        "conv_bias": torch.randn(inner),
        "up_weight": torch.randn(channels, inner) / inner**0.5,
        "up_bias": torch.randn(channels),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [(2, 4, 9, 16, 8, 3), (1, 1, 5, 16, 8, 3), (1, 2, 3, 12, 3, 5), (2, 7, 1, 8, 4, 7), (1, 3, 4, 8, 8, 1)],
    ids=str,
)
def test_against_float64(sizes, dtype):
    assert_three_way(local_temporal, eager, inputs(*sizes), dtype)


def test_class_token_passes_by_and_input_stays():
    given = inputs(2, 4, 9, 16, 8, 3)
    before = given["x"].clone()
    out = local_temporal(**given)
    assert torch.equal(out[:, :, 0], before[:, :, 0])
    assert torch.equal(given["x"], before)


def test_frames_are_seen_in_order():
    given = inputs(1, 4, 9, 16, 8, 3)
    backwards = local_temporal(**{**given, "x": given["x"].flip(1)}).flip(1)
    assert (backwards - local_temporal(**given))[:, :, 1:].abs().max() > 0.1


def test_empty_batch():
    given = inputs(1, 4, 9, 16, 8, 3)
    assert local_temporal(**{**given, "x": given["x"][:0]}).shape == (0, 4, 10, 16)


@pytest.mark.parametrize("kernel", [1, 3, 5, 9])
@pytest.mark.parametrize("frames", [1, 2, 3, 8])
def test_temporal_conv(frames, kernel):
    x, weight, bias = torch.randn(2, frames, 3, 4), torch.randn(4, kernel), torch.randn(4)
    flat = x.permute(0, 2, 3, 1).reshape(6, 4, frames)
    expected = F.conv1d(flat, weight[:, None], bias, padding=kernel // 2, groups=4)
    torch.testing.assert_close(temporal_conv(x, weight, bias), expected.view(2, 3, 4, frames).permute(0, 3, 1, 2))
