import pytest
import torch

from mplug2_fast.ops.attention import attention, beam_attention
from tests.tolerance import assert_three_way

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(query, key, value, mask=None, causal=False):
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e4)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -1e4)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def tensors(batch, queries, keys, heads=2, head_dim=16):
    torch.manual_seed(0)
    shapes = {"query": queries, "key": keys, "value": keys}
    return {name: torch.randn(batch, length, heads, head_dim) for name, length in shapes.items()}


def padding(batch, keys):
    return (torch.arange(keys) < keys - torch.arange(batch)[:, None] % keys).long()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (7, 7), (5, 33), (33, 5), (17, 257)], ids=str)
def test_self_and_cross(lengths, masked, dtype):
    mask = padding(3, lengths[1]) if masked else None
    assert_three_way(
        lambda **i: attention(**i, key_padding_mask=mask),
        lambda **i: eager(**i, mask=mask),
        tensors(3, *lengths),
        dtype,
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_causal(length, masked):
    mask = padding(2, length) if masked else None
    assert_three_way(
        lambda **i: attention(**i, key_padding_mask=mask, causal=True),
        lambda **i: eager(**i, mask=mask, causal=True),
        tensors(2, length, length),
        torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [1, 5, 16, 17, 40])
def test_beam_attention(queries, masked, dtype):
    mask = padding(3, 65) if masked else None
    assert_three_way(
        lambda query, key, value: beam_attention(
            query, key.transpose(1, 2), value.transpose(1, 2), key_padding_mask=mask
        ),
        lambda **i: eager(**i, mask=mask),
        tensors(3, queries, 65),
        dtype,
    )


def test_padding_may_hold_anything_finite():
    given, mask = tensors(2, 3, 6), padding(2, 6)
    expected = attention(**given, key_padding_mask=mask)
    for name in ("key", "value"):
        given[name][1, 5:] = 1e6
    torch.testing.assert_close(attention(**given, key_padding_mask=mask), expected)


def test_empty_batch():
    assert attention(**tensors(0, 3, 5)).shape == (0, 3, 32)
