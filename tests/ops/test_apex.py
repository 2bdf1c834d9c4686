"""NVIDIA's apex as a backend of the layer norms, replaced by packages with its arithmetic on the CPU."""

import dataclasses
import importlib
import sys

import pytest
import torch
from torch.nn import functional as F

from mplug2_fast import info, ops
from mplug2_fast.errors import BackendError
from mplug2_fast.ops.runtime import apex

NORMS = """
import torch
from torch.nn import functional as F

def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6):
    assert not torch.is_autocast_enabled("cpu")
    assert input.is_contiguous()
    return F.layer_norm(input, normalized_shape, weight, bias, eps)

def fused_layer_norm(input, normalized_shape, eps=1e-6):
    return F.layer_norm(input, normalized_shape, None, None, eps)
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A function that installs files in a separate folder."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "fused_layer_norm_cuda")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        apex.error.cache_clear()

    def install(**files):
        for path, text in files.items():
            target = tmp_path / (path.replace("__", "/") + ".py")
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.parent != tmp_path:
                (target.parent / "__init__.py").touch()
            target.write_text(text)
        forget()

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    forget()
    yield install
    forget()


@pytest.fixture
def installed(site, monkeypatch):
    """Apex, on any device."""
    site(apex__normalization__fused_layer_norm=NORMS, fused_layer_norm_cuda="")
    for operator in (ops.layer_norm, ops.add_layer_norm):
        backends = operator.op.backends
        monkeypatch.setitem(backends, "apex", dataclasses.replace(backends["apex"], devices=()))


def test_nothing_is_looked_up_before_it_is_needed(installed):
    ops.layer_norm(torch.randn(2, 8))
    assert "apex" not in sys.modules


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_and_its_gradients(installed, affine):
    x = torch.randn(8, 5).t()
    weight, bias = (torch.randn(8).requires_grad_() if affine else None for _ in range(2))
    ours, expected = (x.clone().requires_grad_() for _ in range(2))
    parameters = [weight, bias] if affine else []
    with ops.use_backend("apex"):
        out = ops.layer_norm(ours, weight, bias, eps=1e-3)
    true = F.layer_norm(expected, (8,), weight, bias, 1e-3)
    torch.testing.assert_close(out, true)
    direction = torch.randn_like(true)
    for one, other in zip(
        torch.autograd.grad(out, [ours, *parameters], direction),
        torch.autograd.grad(true, [expected, *parameters], direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_add_layer_norm(installed):
    x, update, weight, bias = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), torch.randn(8)
    with ops.use_backend("apex"):
        out, total = ops.add_layer_norm(x, update, weight, bias, scale=0.5, return_sum=True)
    torch.testing.assert_close(total, x + 0.5 * update)
    torch.testing.assert_close(out, F.layer_norm(total, (8,), weight, bias))


def test_the_type_of_x_is_kept_under_autocast(installed):
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16), ops.use_backend("apex"):
        assert ops.layer_norm(x, torch.randn(8), torch.randn(8)).dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "weight", "bias", "what"),
    [
        (torch.randn(2, 8), torch.randn(8), None, "weight and bias, or neither"),
        (torch.randn(2, 8).bfloat16(), torch.randn(8), torch.randn(8), "weight is torch.float32, x is torch.bfloat16"),
        (torch.randn(2, 8).double(), None, None, "got torch.float64"),
        (torch.randn(0, 8), None, None, "does not support empty inputs"),
    ],
)
def test_what_it_is_not_for(installed, x, weight, bias, what):
    with ops.use_backend("apex"), pytest.raises(BackendError, match=what):
        ops.layer_norm(x, weight, bias)


def test_another_update_is_not_for_it(installed):
    with ops.use_backend("apex"), pytest.raises(BackendError, match=r"update is torch\.float64"):
        ops.add_layer_norm(torch.randn(2, 8), torch.randn(2, 8).double())


def test_pypis_apex_is_another_project(site):
    site(apex____init__="raise RuntimeError('imported')", apex__models="")
    assert "another project, from PyPI" in apex.error()
    assert "not NVIDIA's apex" in info._packages()["apex"]


def test_apex_without_its_extension(site):
    site(apex__normalization__fused_layer_norm=NORMS)
    assert "built without fused_layer_norm_cuda" in apex.error()


def test_apex_for_another_torch(site):
    site(
        apex__normalization__fused_layer_norm=NORMS,
        fused_layer_norm_cuda="raise ImportError('undefined symbol: _ZN2at')",
    )
    assert "undefined symbol: _ZN2at): build it for this torch" in apex.error()


def test_no_apex(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    apex.error.cache_clear()
    assert apex.error().startswith("apex is not installed: NVIDIA's is built from")
    apex.error.cache_clear()
