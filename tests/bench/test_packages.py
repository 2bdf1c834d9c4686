"""Packages that operators are compared with, replaced by stand-ins."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch

from bench import packages
from bench.row import Key
from mplug2_fast import ops
from mplug2_fast.ops.runtime import packages as installed


def key(name, dtype="bfloat16", direction="forward", level="ops", device="cpu"):
    return Key(level, name, "base", direction, dtype, device)


def arguments(op, dtype=torch.bfloat16, **sizes):
    spec = ops.OPERATORS[op].op.spec
    return spec.inputs(sizes or spec.edge_cases[0], dtype)


class OnCuda(torch.Tensor):
    """Claims to be on a GPU."""

    device = torch.device("cuda")
    is_cpu, is_cuda = False, True


@pytest.fixture
def nothing_cached():
    installed.error.cache_clear()
    yield
    installed.error.cache_clear()


@pytest.fixture
def stand_in(monkeypatch, nothing_cached):
    def put(name, **members):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:end]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(members)

    return put


@pytest.fixture
def backends_for_any_device(monkeypatch):
    """Makes package backends accept CPU tensors."""
    for name in ("attention", "layer_norm"):
        backends = ops.OPERATORS[name].op.backends
        for package in set(installed.BACKENDS) & set(backends):
            monkeypatch.setitem(backends, package, dataclasses.replace(backends[package], devices=()))


def test_without_a_gpu_no_package_has_a_column():
    assert packages.ways("attention", arguments("attention")) == {}
    why_not = packages.why_not("layer_norm", arguments("layer_norm"))
    assert why_not.keys() == {"apex", "liger_kernel"}
    assert all("cuda" in reason and "cpu" in reason for reason in why_not.values())


def test_layer_norm_of_liger_kernel(stand_in):
    class LigerLayerNorm(torch.nn.LayerNorm):
        def __init__(self, hidden_size, eps):
            super().__init__(hidden_size, eps)

    stand_in("liger_kernel.transformers", LigerLayerNorm=LigerLayerNorm)
    given = arguments("layer_norm", torch.float32)
    on_a_gpu = {**given, "x": given["x"].as_subclass(OnCuda)}
    assert "liger_kernel" not in packages.why_not("layer_norm", on_a_gpu)
    run = packages.ways("layer_norm", on_a_gpu)["liger_kernel"](given)
    torch.testing.assert_close(run(), ops.layer_norm(given["x"], given["weight"], given["bias"], eps=given["eps"]))
    plain = {**on_a_gpu, "weight": None, "bias": None}
    assert packages.why_not("layer_norm", plain)["liger_kernel"] == "its layer norm needs a weight and a bias"


def test_reasons_are_grouped():
    keys = [
        key("layer_norm"),
        key("layer_norm", "float32"),
        key("add_layer_norm"),
        key("attention", direction="backward"),
        key("attention", level="modules"),
    ]
    apex, liger = packages.reasons(keys)
    assert apex.startswith("no column apex for layer_norm, add_layer_norm: ")
    assert liger == "no column liger_kernel for layer_norm: supports cuda, got cpu"
