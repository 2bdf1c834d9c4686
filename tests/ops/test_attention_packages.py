"""Attention by flash_attn and xformers, replaced by stand-ins that check the packages' requirements."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from mplug2_fast import ops
from mplug2_fast.errors import BackendError
from mplug2_fast.ops.runtime import packages
from tests.tolerance import assert_close_enough

OP = ops.attention.op
NAMES = ("flash_attn", "xformers")


def plain_attention(query, key, value, causal):
    for tensor in (query, key, value):
        assert tensor.dim() == 4
        assert tensor.dtype in (torch.float16, torch.bfloat16)
        assert tensor.stride(-1) == 1
        assert tensor.data_ptr() % 16 == 0
        if tensor.shape[-1] % 8 == 0:
            assert all(stride % 8 == 0 for stride in tensor.stride()[:3])
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    assert dropout_p == 0
    assert softmax_scale is None
    return plain_attention(q, k, v, causal)


class LowerTriangularMask:
    pass


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    assert p == 0
    assert scale is None
    assert attn_bias is None or isinstance(attn_bias, LowerTriangularMask)
    assert query.shape[-1] % 8 == 0
    return plain_attention(query, key, value, attn_bias is not None)


@pytest.fixture(autouse=True)
def _looked_for_anew():
    packages.error.cache_clear()
    yield
    packages.error.cache_clear()


@pytest.fixture(params=NAMES)
def package(request, monkeypatch):
    """The name of an installed package whose backend serves the CPU."""
    made = {"flash_attn": ModuleType("flash_attn"), "xformers": ModuleType("xformers")}
    made["xformers.ops"] = made["xformers"].ops = ModuleType("xformers.ops")
    made["flash_attn"].flash_attn_func = flash_attn_func
    made["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    made["xformers.ops"].LowerTriangularMask = LowerTriangularMask
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    backend = dataclasses.replace(OP.backends[request.param], devices=("cpu",))
    monkeypatch.setitem(OP.backends, request.param, backend)
    return request.param


def reasons(package, *arguments, **options):
    with torch.no_grad():
        return ops.explain(ops.attention, *arguments, **options).reasons[package]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["dense", "fused", "every other channel", "begins anywhere"])
def test_forward_and_gradients(package, dtype, causal, layout):
    memory = torch.randn(2, 9, 3, 2, 2 * 16 + 8).to(dtype)
    first, step = {"every other channel": (0, 2), "begins anywhere": (1, 1)}.get(layout, (0, 1))
    query, key, value = memory[..., first::step][..., :16].unbind(2)
    if layout == "dense":
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    results = []
    for name, wide in ((package, dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [tensor.detach().to(wide).requires_grad_() for tensor in (query, key, value)]
        with ops.use_backend(name):
            out = ops.attention(*leaves, causal=causal)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert results[0][0].is_contiguous()
    for ours, eager, exact in zip(*results, strict=True):
        assert_close_enough(ours, eager, exact, OP.spec.noise_floor[dtype], package)


def test_reasons(package):
    x = torch.randn(1, 3, 2, 16)
    half = x.half()
    assert reasons(package, x, x, x) == (f"{package} supports float16 and bfloat16, got torch.float32",)
    (why,) = reasons(package, half, half.bfloat16(), half)
    assert why == "key is torch.bfloat16, the first argument torch.float16"
    wide = torch.randn(1, 3, 2, 264).half()
    assert reasons(package, wide, wide, wide) == (f"{package} supports heads of up to 256 channels, got 264",)
    (why,) = reasons(package, half, half, half, key_padding_mask=torch.ones(1, 3))
    assert "key_padding_mask" in why
    assert reasons(package, half, half[:, :0], half[:, :0]) == (
        f"{package} does not support empty batches or sequences",
    )


def test_odd_channels(package):
    odd = torch.randn(1, 3, 2, 5).half()
    with ops.use_backend(package):
        if package == "xformers":
            with pytest.raises(BackendError, match="heads of a multiple of 8 channels, got 5"):
                ops.attention(odd, odd, odd)
        else:  # pads them itself
            assert ops.attention(odd, odd, odd).shape == (1, 3, 10)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_for_cuda(name):
    x = torch.randn(1, 3, 2, 16).half()
    assert reasons(name, x, x, x) == ("supports cuda, got cpu",)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, r"{0} is not installed: pip install"),
        (OSError("undefined symbol: _ZN3c10"), r"{0} cannot be imported \(OSError: undefined symbol: _ZN3c10\): pip"),
        (
            ModuleNotFoundError("No module named 'einops'", name="einops"),
            r"{0} cannot be imported \(No module .*einops",
        ),
    ],
)
def test_a_package_that_cannot_be_imported_says_why(name, error, told, monkeypatch):
    monkeypatch.setitem(OP.backends, name, dataclasses.replace(OP.backends[name], devices=()))

    class Broken:
        def find_spec(self, module, *_):
            if module.split(".")[0] == name:
                raise error or ModuleNotFoundError(f"No module named {name!r}", name=name)

    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    x = torch.randn(1, 3, 2, 16).half()
    with ops.use_backend(name), pytest.raises(BackendError, match=told.format(name)):
        ops.attention(x, x, x)
