import pytest
import torch

from mplug2_fast.nn import MLP, CrossAttention, LocalTemporal, SelfAttention


def test_self_attention_is_torchs():
    ours, theirs = SelfAttention(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        for mine, released in (
            (ours.qkv.weight, theirs.in_proj_weight),
            (ours.qkv.bias, theirs.in_proj_bias.normal_()),
            (ours.out.weight, theirs.out_proj.weight),
            (ours.out.bias, theirs.out_proj.bias.normal_()),
        ):
            mine.copy_(released)
    x, mask = torch.randn(2, 7, 32), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    expected = theirs(x, x, x, key_padding_mask=mask == 0, need_weights=False)[0]
    torch.testing.assert_close(ours(x, key_padding_mask=mask), expected, atol=1e-5, rtol=1e-5)
    frames = torch.randn(2, 3, 7, 32)  # any leading axes: attention stays within the last but one
    torch.testing.assert_close(ours(frames)[1, 2], ours(frames[1, 2][None])[0], atol=1e-5, rtol=1e-5)


def test_cross_attention_is_torchs():
    ours, theirs = CrossAttention(32, 2), torch.nn.MultiheadAttention(32, 2, batch_first=True)
    with torch.no_grad():
        ours.query.weight.copy_(theirs.in_proj_weight[:32])
        ours.kv.weight.copy_(theirs.in_proj_weight[32:])
        ours.query.bias.zero_()
        ours.kv.bias.zero_()
        ours.out.weight.copy_(theirs.out_proj.weight)
        ours.out.bias.zero_()
    x, memory = torch.randn(2, 3, 32), torch.randn(2, 11, 32)
    mask = torch.tensor([[1] * 11, [1] * 5 + [0] * 6])
    expected = theirs(x, memory, memory, key_padding_mask=mask == 0, need_weights=False)[0]
    torch.testing.assert_close(ours(x, memory, key_padding_mask=mask), expected, atol=1e-5, rtol=1e-5)


def test_dropout_only_when_training():
    torch.manual_seed(0)
    module, x = SelfAttention(32, 2, dropout=0.5), torch.randn(2, 9, 32)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention])
def test_heads_must_divide(kind):
    with pytest.raises(ValueError, match="dim 30 is not a multiple of num_heads 4"):
        kind(30, 4)


def test_local_temporal_starts_as_the_identity_and_learns():
    module, x = LocalTemporal(16, reduction=4, kernel_size=5), torch.randn(2, 6, 5, 16)
    assert torch.equal(module(x), x)
    module(x).square().sum().backward()
    assert module.up_proj.weight.grad.norm() > 0
    with pytest.raises(ValueError, match="odd"):
        LocalTemporal(16, kernel_size=4)


def test_mlp():
    module, norm, x = MLP(8, 20, "gelu"), torch.nn.LayerNorm(8), torch.randn(3, 8)
    plain = module.proj(torch.nn.functional.gelu(module.fc(norm(x))))
    torch.testing.assert_close(module(x, norm=norm), plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(module(x, norm=norm, residual=True), x + plain, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="weight and a bias"):
        module(x, norm=torch.nn.LayerNorm(8, elementwise_affine=False))
