import pytest
import torch

from mplug2_fast.nn import MLP, CrossAttention, LocalTemporal, SelfAttention


def as_in_torch(kind, embed_dim, num_heads, **options):
    """(our module, PyTorch's) with the same weights, loaded through the state dict."""
    theirs = torch.nn.MultiheadAttention(embed_dim, num_heads, batch_first=True, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * embed_dim**-0.5)
    ours = kind(embed_dim, num_heads, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_equals_torch(bias):
    ours, theirs = as_in_torch(SelfAttention, 32, 4, bias=bias)
    x, mask = torch.randn(2, 7, 32), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    expected = theirs(x, x, x, key_padding_mask=mask == 0, need_weights=False)[0]
    torch.testing.assert_close(ours(x, key_padding_mask=mask), expected, atol=1e-5, rtol=1e-5)
    triangle = torch.ones(7, 7, dtype=torch.bool).triu(1)
    expected = theirs(x, x, x, attn_mask=triangle, need_weights=False)[0]
    torch.testing.assert_close(ours(x, causal=True, residual=x), x + expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_equals_torch(bias):
    ours, theirs = as_in_torch(CrossAttention, 32, 2, bias=bias)
    x, memory = torch.randn(2, 3, 32), torch.randn(2, 11, 32)
    mask = torch.tensor([[1] * 11, [1] * 5 + [0] * 6])
    expected = theirs(x, memory, memory, key_padding_mask=mask == 0, need_weights=False)[0]
    torch.testing.assert_close(ours(x, memory, key_padding_mask=mask), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ours.attend(ours.project_query(x), memory, key_padding_mask=mask, residual=x),
        x + expected,
        atol=1e-5,
        rtol=1e-5,
    )


def test_dropout_only_when_training():
    torch.manual_seed(0)
    module, x = SelfAttention(32, 2, dropout=0.5), torch.randn(2, 9, 32)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention])
def test_num_heads_must_divide_embed_dim(kind):
    with pytest.raises(ValueError, match="embed_dim 30 is not a multiple of num_heads 4"):
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
    plain = module.c_proj(torch.nn.functional.gelu(module.c_fc(norm(x))))
    torch.testing.assert_close(module(x, norm=norm), plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(module(x, norm=norm, residual=True), x + plain, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="weight and a bias"):
        module(x, norm=torch.nn.LayerNorm(8, elementwise_affine=False))
