"""Every call is served or raises, and nothing beyond a tensor's memory is read or written."""

import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.ops.runtime import memory
from tests.ops.suite import as_tuple

EMPTY = {
    "linear_act": ({"rows": (3,), "inputs": 0, "outputs": 5}, {"rows": (3,), "inputs": 5, "outputs": 0}),
    "mlp": ({"rows": (3,), "channels": 4, "hidden": 0}, {"rows": (3,), "channels": 0, "hidden": 4}),
    "attention": (
        {"batch": 1, "queries": 3, "keys": 4, "head_dim": 0},
        {"batch": 1, "queries": 0, "keys": 4},
        {"batch": 1, "queries": 3, "keys": 0},
        {"batch": 1, "queries": 3, "keys": 4, "heads": 0},
    ),
    "layer_norm": ({"rows": (3,), "channels": 0},),
    "norm_linear_act": ({"rows": (3,), "inputs": 5, "outputs": 0},),
    "local_temporal": (
        {"batch": 1, "frames": 0, "patches": 3, "channels": 4, "inner": 4},
        {"batch": 1, "frames": 2, "patches": 0, "channels": 4, "inner": 4, "class_token": False},
        {"batch": 1, "frames": 2, "patches": 3, "channels": 4, "inner": 0},
    ),
}
"""Sizes that PyTorch's own operators serve."""


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("name", "sizes"), [(name, sizes) for name, every in EMPTY.items() for sizes in every])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sides_of_zero(name, sizes, dtype, backend, native_module):
    op = ops.OPERATORS[name].op
    given = _inputs(op, sizes, dtype)
    with ops.use_backend(backend):
        out = op(*given)
    with ops.use_backend("torch"):
        expected = op(*given)
    for one, other in zip(as_tuple(out), as_tuple(expected), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", EMPTY)
def test_gradients_with_sides_of_zero(name):
    op = ops.OPERATORS[name].op
    for sizes in EMPTY[name]:
        leaves = [
            value.requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for value in _inputs(op, sizes, torch.float32)
        ]
        results = as_tuple(op(*leaves))
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
        assert all(leaf.grad.shape == leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.numel())


def _inputs(op, sizes, dtype):
    """With sizes of 1 in place of 0, cut to those of 0: random tensors of no width have no scale."""
    whole = op.spec.inputs({k: v or 1 for k, v in sizes.items()}, dtype)
    bare = op.spec.inputs({k: (v or 2) if type(v) is int else v for k, v in sizes.items()}, dtype)
    cut = []
    for one, two in zip(whole.values(), bare.values(), strict=True):
        if isinstance(one, torch.Tensor):
            for axis, (small, large) in enumerate(zip(one.shape, two.shape, strict=True)):
                one = one.narrow(axis, 0, 0) if small != large else one
        cut.append(one)
    return cut


@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize("way", ["function", "torch.ops", "backward", "gradients"])
def test_a_storage_that_is_too_small(size, way, native_module):
    x = torch.randn(6, 8)
    x.untyped_storage().resize_(size)
    grads = [torch.ones(6, 8)]
    calls = {
        "function": lambda: ops.layer_norm(x),
        "torch.ops": lambda: torch.ops.mplug2_fast.layer_norm(x, None, None, 1e-5),
        "backward": lambda: torch.ops.mplug2_fast.layer_norm_backward(grads, x, None, None, 1e-5, [True, False, False]),
        "gradients": lambda: ops.layer_norm(x.requires_grad_()),
    }
    with pytest.raises(ValueError, match=f"x of shape .6, 8. needs 192 bytes, and its storage has {size}"):
        calls[way]()


def test_a_view_that_reaches_past_its_storage(native_module):
    memory = torch.randn(100)
    view = memory.as_strided((4, 8), (24, 1))
    ops.layer_norm(view)
    memory.untyped_storage().resize_(4 * 32)
    with pytest.raises(ValueError, match="needs 320 bytes, and its storage has 128"):
        ops.layer_norm(view)


@pytest.mark.parametrize("name", ["layer_norm", "linear_act", "attention", "mlp", "beam_step"])
def test_a_pending_minus_sign(name, native_module):
    op = ops.OPERATORS[name].op
    given = op.spec.inputs(op.spec.edge_cases[1])
    first = next(iter(given))
    negative = {**given, first: torch._neg_view(-given[first])}
    for call in (op, op.torch_op):
        for one, other in zip(as_tuple(call(*negative.values())), as_tuple(call(*given.values())), strict=True):
            torch.testing.assert_close(one, other)


def test_tensors_without_memory_are_zeros(native_module):
    zeros = torch._efficientzerotensor((3, 4))
    assert torch.equal(ops.layer_norm(zeros), torch.zeros(3, 4))


UNUSUAL = {
    "transposed": lambda: torch.randn(4, 3).t(),
    "expanded": lambda: torch.ones(1).expand(5),
    "empty": lambda: torch.empty(0, 3),
    "a number": lambda: torch.tensor(1.0),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "a subclass": lambda: torch.ones(3).as_subclass(torch.nn.Buffer),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "negative": lambda: torch._neg_view(torch.ones(3)),
    "zero": lambda: torch._efficientzerotensor((3,)),
    "freed": lambda: freed(torch.ones(3)),
    "freed view": lambda: freed(torch.ones(5)[2:]),
}


def freed(t):
    t.untyped_storage().resize_(4)
    return t


@pytest.mark.parametrize("name", UNUSUAL)
def test_native_facts_agree_with_python(name, native_module, monkeypatch):
    values = (UNUSUAL[name](), None, 1, 1.5, True, "text", torch.float32)
    found = memory.facts(values)
    monkeypatch.setattr(memory, "native_tests", lambda: None)
    assert found == memory.facts(values)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_states_are_memory_of_each_row(backend, native_module):
    given = ops.step_attention.op.spec.inputs({"rows": 3, "length": 5, "step": 2})
    with ops.use_backend(backend):
        shared = {**given, "keys": given["keys"][:1].expand_as(given["keys"])}
        with pytest.raises(ValueError, match="keys is written, and its elements share memory"):
            ops.step_attention.op(*shared.values())
        with pytest.raises(ValueError, match="keys is written, and its elements share memory"):
            torch.ops.mplug2_fast.step_attention(*shared.values())
        for wrong in (-1, 3):
            given["ancestors"][1, 1] = wrong
            with pytest.raises(ValueError, match="an ancestor is not one of the"):
                ops.step_attention.op(*given.values())


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_registered_operators_check_shapes(name):
    op = ops.OPERATORS[name].op
    given = op.spec.inputs(op.spec.edge_cases[0])
    given[next(iter(given))] = torch.ones(2, 3, 5, 7, 9, dtype=torch.uint8)
    with pytest.raises((ValueError, TypeError)):
        op.torch_op(*given.values())


def test_backward_checks_what_it_is_given():
    x = torch.randn(3, 8)
    backward = torch.ops.mplug2_fast.layer_norm_backward
    with pytest.raises(ValueError, match="takes 1 grads and 3 needs, got 2 and 3"):
        backward([x, x], x, None, None, 1e-5, [True, False, False])
    with pytest.raises(ValueError, match="cannot give the gradient of weight, which is None"):
        backward([x], x, None, None, 1e-5, [True, True, False])
    with pytest.raises(ValueError, match="weight must have shape"):
        backward([x], x, torch.ones(9), None, 1e-5, [True, True, False])


def test_want_of_memory_in_a_thread(native_module):
    """Keys that are a single number in memory, and that the kernel would copy."""
    key = torch.ones(2, 64).expand(1, 2**31 - 64, 2, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError, match="use smaller batches or shorter sequences"):
            ops.attention(torch.randn(1, 600, 2, 64), key, key)
    finally:
        torch.set_num_threads(threads)
