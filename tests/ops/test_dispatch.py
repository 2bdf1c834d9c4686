"""Which backend serves a call: explanations, forcing, strictness."""

import threading
from dataclasses import replace

import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.errors import BackendError
from mplug2_fast.ops.runtime import cpu

X, HALF = torch.randn(3, 16), torch.randn(3, 16).half()


def test_explain(native_module):
    explanation = ops.explain(ops.layer_norm, X)
    assert explanation.chosen == "cpu"
    assert explanation.reasons == {
        "triton": ("supports cuda, got cpu",),
        "apex": ("supports cuda, got cpu",),
        "torch": ("cpu comes first",),
        "reference": ("runs only if use_backend selects it",),
    }
    explanation = ops.explain(ops.layer_norm, HALF, eps=1e-6)
    assert explanation.chosen == "torch"
    assert explanation.reasons["cpu"] == ("native kernels support float32 and bfloat16, got torch.float16",)
    assert str(explanation).splitlines()[0] == "layer_norm: served by torch"
    assert str(explanation).splitlines()[1].startswith("  not cpu: native kernels support")


def test_explain_with_gradients(native_module):
    explanation = ops.explain(ops.layer_norm, X.clone().requires_grad_())
    assert explanation.chosen == "torch"
    assert "has no backward" in explanation.reasons["cpu"][0]
    with torch.no_grad():
        assert ops.explain(ops.layer_norm, X.clone().requires_grad_()).chosen == "cpu"


def test_explain_with_a_forced_backend(native_module):
    with ops.use_backend("torch"):
        explanation = ops.explain(ops.layer_norm, X)
    assert explanation.chosen == "torch"
    assert explanation.reasons["cpu"] == ("use_backend('torch') is active",)
    with ops.use_backend("triton"):
        explanation = ops.explain(ops.layer_norm, X)
    assert explanation.chosen is None
    assert explanation.reasons["triton"] == ("supports cuda, got cpu",)


def test_explain_needs_an_operator():
    with pytest.raises(TypeError, match="is not an operator"):
        ops.explain(torch.relu, X)


def test_a_forced_backend_that_cannot_serve_raises(native_module):
    with ops.use_backend("cpu"), pytest.raises(BackendError) as caught:
        ops.layer_norm(HALF, torch.ones(16).half())
    message = str(caught.value)
    assert message.startswith("layer_norm cannot run on the backend 'cpu'. Arguments: x float16 (3, 16) on cpu, weight")
    assert "cpu: native kernels support float32 and bfloat16, got torch.float16" in message
    assert "\n" not in message


def test_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend 'fast': choose from"), ops.use_backend("fast"):
        pass


def test_forcing_affects_one_thread(native_module):
    seen = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(ops.explain(ops.layer_norm, X).chosen))
        thread.start()
        thread.join()
        assert ops.explain(ops.layer_norm, X).chosen == "reference"
        with ops.use_backend("torch"):
            assert ops.explain(ops.layer_norm, X).chosen == "torch"
        assert ops.explain(ops.layer_norm, X).chosen == "reference"
    assert seen == ["cpu"]
    assert ops.explain(ops.layer_norm, X).chosen == "cpu"


def test_strict_turns_a_fallback_into_an_error(native_module):
    with ops.strict():
        ops.layer_norm(X)
        with pytest.raises(BackendError, match="layer_norm would fall back to 'torch'"):
            ops.layer_norm(HALF)
    ops.layer_norm(HALF)


class TestFaster:
    """A backend that could serve is skipped for a faster one."""

    @pytest.fixture(autouse=True)
    def _outrun(self, monkeypatch, native_module):
        op = ops.layer_norm.op
        slower = replace(op.backends["cpu"], slower_reasons=lambda needs_grad, a: ["slow"] if len(a.x) == 3 else [])
        monkeypatch.setitem(op.backends, "cpu", slower)

    def test_explain(self):
        explanation = ops.explain(ops.layer_norm, X)
        assert explanation.chosen == "torch"
        assert explanation.reasons["cpu"] == ("slow",)
        assert ops.explain(ops.layer_norm, X[:2]).chosen == "cpu"

    def test_strict_allows_it(self):
        with ops.strict():
            ops.layer_norm(X)

    def test_it_can_be_forced(self):
        with ops.use_backend("cpu"):
            assert ops.explain(ops.layer_norm, X).chosen == "cpu"
            ops.layer_norm(X)


def test_without_the_native_module_torch_serves(monkeypatch):
    monkeypatch.setattr(cpu, "native_error", lambda: "the native module is missing")
    explanation = ops.explain(ops.layer_norm, X)
    assert explanation.chosen == "torch"
    assert explanation.reasons["cpu"] == ("the native module is missing",)


def test_the_instruction_set_can_be_chosen(monkeypatch, native_module):
    monkeypatch.setenv(cpu.ISA_VARIABLE, "portable")
    assert cpu.isa.__wrapped__() == native_module.Isa.portable
    monkeypatch.setenv(cpu.ISA_VARIABLE, "sse9")
    with pytest.raises(ValueError, match="there is no instruction set sse9: choose portable"):
        cpu.isa.__wrapped__()


def test_gradients_through_the_forced_native_kernel(native_module):
    """The kernel runs the forward, the recomputed formula gives the backward: the graph has one node."""
    x = X.clone().requires_grad_()
    with ops.use_backend("cpu"):
        out = ops.layer_norm(x)
    assert "mplug2_fast" in type(out.grad_fn).__name__
    out.square().sum().backward()
    other = X.clone().requires_grad_()
    torch.nn.functional.layer_norm(other, (16,)).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_the_same_tensor_twice():
    """One tensor is both key and value: its gradient is the sum of both."""
    query, memory = torch.randn(1, 3, 2, 8), torch.randn(1, 5, 2, 8)
    gradients = []
    for backend in ("cpu", "reference"):
        leaf = memory.clone().requires_grad_()
        with ops.use_backend(backend):
            ops.attention(query, leaf, leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
