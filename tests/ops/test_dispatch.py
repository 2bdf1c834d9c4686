"""Which backend serves a call, and how that is told and forced."""

import threading
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mplug2_fast import ops
from mplug2_fast.errors import BackendError
from mplug2_fast.ops.runtime import cpu

X, HALF = torch.randn(3, 16), torch.randn(3, 16).half()


def test_explain(native_module):
    explanation = ops.explain(ops.layer_norm, X)
    assert explanation.chosen == "cpu"
    assert explanation.reasons == {
        "triton": ("it is for cuda, not for cpu",),
        "apex": ("it is for cuda, not for cpu",),
        "torch": ("cpu comes first",),
        "reference": ("it runs only where use_backend asks for it",),
    }
    explanation = ops.explain(ops.layer_norm, HALF, eps=1e-6)
    assert explanation.chosen == "torch"
    assert explanation.reasons["cpu"] == ("native kernels are for float32 and bfloat16, not torch.float16",)
    assert str(explanation).splitlines()[0] == "layer_norm: served by torch"
    assert str(explanation).splitlines()[1].startswith("  not cpu: native kernels are for")


def test_explain_where_gradients_are_asked_for(native_module):
    explanation = ops.explain(ops.layer_norm, X.clone().requires_grad_())
    assert explanation.chosen == "torch"
    assert "no backward of its own" in explanation.reasons["cpu"][0]
    with torch.no_grad():
        assert ops.explain(ops.layer_norm, X.clone().requires_grad_()).chosen == "cpu"


def test_explain_where_a_backend_is_forced(native_module):
    with ops.use_backend("torch"):
        explanation = ops.explain(ops.layer_norm, X)
    assert explanation.chosen == "torch"
    assert explanation.reasons["cpu"] == ("use_backend('torch') is in force",)
    with ops.use_backend("triton"):
        explanation = ops.explain(ops.layer_norm, X)
    assert explanation.chosen is None
    assert explanation.reasons["triton"] == ("it is for cuda, not for cpu",)


def test_explain_needs_an_operator():
    with pytest.raises(TypeError, match="is not an operator"):
        ops.explain(torch.relu, X)


def test_a_forced_backend_that_cannot_serve_says_why(native_module):
    with ops.use_backend("cpu"), pytest.raises(BackendError) as caught:
        ops.layer_norm(HALF, torch.ones(16).half())
    message = str(caught.value)
    assert message.startswith("layer_norm cannot run on the backend 'cpu'. Arguments: x float16 (3, 16) on cpu, weight")
    assert "cpu: native kernels are for float32 and bfloat16, not torch.float16" in message
    assert "\n" not in message


def test_no_such_backend():
    with pytest.raises(ValueError, match="there is no backend 'fast': choose from"), ops.use_backend("fast"):
        pass


def test_backends_are_forced_in_this_thread_alone(native_module):
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
    """A backend that could serve leaves a call to a later one that is faster."""

    @pytest.fixture(autouse=True)
    def _outrun(self, monkeypatch, native_module):
        op = ops.layer_norm.op
        slower = replace(op.backends["cpu"], slower_reasons=lambda needs_grad, x, *_: ["slow"] if len(x) == 3 else [])
        monkeypatch.setitem(op.backends, "cpu", slower)
        monkeypatch.setattr(op, "_automatic", [b for b in op.backends.values() if b.name != "reference"])

    def test_explain(self):
        explanation = ops.explain(ops.layer_norm, X)
        assert explanation.chosen == "torch"
        assert explanation.reasons["cpu"] == ("slow",)
        assert ops.explain(ops.layer_norm, X[:2]).chosen == "cpu"

    def test_it_is_no_fallback(self):
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
    """Forward by the kernel, backward by the formula computed again: the graph has one node."""
    x = X.clone().requires_grad_()
    with ops.use_backend("cpu"):
        out = ops.layer_norm(x)
    assert "mplug2_fast" in type(out.grad_fn).__name__
    out.square().sum().backward()
    other = X.clone().requires_grad_()
    torch.nn.functional.layer_norm(other, (16,)).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_the_same_tensor_twice():
    """Keys that are values too: the gradient is the sum of both."""
    query, memory = torch.randn(1, 3, 2, 8), torch.randn(1, 5, 2, 8)
    gradients = []
    for backend in ("cpu", "reference"):
        leaf = memory.clone().requires_grad_()
        with ops.use_backend(backend):
            ops.attention(query, leaf, leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_modes_see_the_operator():
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(X)
        assert ops.layer_norm(fake).shape == X.shape


def test_training_under_compile():
    """The real operator inside a compiled training step, with gradients like eager ones."""
    weight = torch.randn(16, requires_grad=True)

    def loss(x, weight):
        return (ops.layer_norm(x * 2, weight) * x).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(X, weight).backward()
    gradient, weight.grad = weight.grad, None
    loss(X, weight).backward()
    torch.testing.assert_close(gradient, weight.grad)
