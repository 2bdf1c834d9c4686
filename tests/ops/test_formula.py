"""Meta tensors, tensor subclasses, modes, traces: as with PyTorch's own operators."""

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mplug2_fast import ops
from mplug2_fast.errors import BackendError
from tests.ops.suite import as_tuple, on_cpu, served_by

X, WEIGHT, BIAS = torch.randn(6, 16), torch.randn(8, 16), torch.randn(8)


class Named(Tensor):
    """A subclass that knows nothing of this package. Every operator returns one."""


@pytest.mark.parametrize("name", ops.OPERATORS)
@pytest.mark.parametrize("autocast", [False, True])
def test_meta_tensors_give_shapes(name, autocast):
    op = ops.OPERATORS[name].op
    given = op.spec.inputs(op.spec.edge_cases[1])
    with served_by(on_cpu(op)):
        real = op(*(v.clone() if isinstance(v, Tensor) else v for v in given.values()))
    with torch.autocast("cpu", enabled=autocast):
        made = op(*(v.to("meta") if isinstance(v, Tensor) else v for v in given.values()))
    for one, other in zip(as_tuple(made), as_tuple(real), strict=True):
        assert one.is_meta
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_a_tensor_subclass_stays_one(native_module):
    out = ops.linear_act(X, WEIGHT.as_subclass(Named), BIAS, "gelu")
    assert type(out) is Named
    torch.testing.assert_close(out.as_subclass(Tensor), ops.linear_act(X, WEIGHT, BIAS, "gelu"))
    why = ops.explain(ops.linear_act, X, WEIGHT.as_subclass(Named)).reasons["cpu"]
    assert why == ("a tensor is a Named, which only PyTorch's own operators can read",)
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="a tensor is a Named"):
        ops.linear_act(X, WEIGHT.as_subclass(Named))
    with ops.strict(), pytest.raises(BackendError, match="would fall back"):
        ops.linear_act(X, WEIGHT.as_subclass(Named))


def test_modes_see_one_operator(native_module):
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    for mode in (Functions(), Dispatches()):
        seen.clear()
        with mode:
            ops.layer_norm(X)
        assert torch.ops.mplug2_fast.layer_norm.default in seen
    graph = make_fx(lambda x: ops.layer_norm(x))(X).graph
    assert torch.ops.mplug2_fast.layer_norm.default in [node.target for node in graph.nodes]


def test_a_default_device_changes_nothing(native_module, monkeypatch):
    monkeypatch.setattr(ops.layer_norm.op, "torch_op", None)
    with torch.device("cpu"):
        ops.layer_norm(X)


def test_traces_hold_pytorchs_operators(native_module):
    """A traced function takes any number of rows, and can be saved."""

    def block(x: Tensor, memory: Tensor) -> Tensor:
        h = ops.linear_act(ops.layer_norm(x), WEIGHT, BIAS, "gelu").unflatten(-1, (2, 4))[None]
        return ops.attention(h, memory, memory)

    traced = torch.jit.trace(block, (X, torch.randn(1, 5, 2, 4)), check_trace=False)
    for rows, keys in ((6, 5), (3, 9)):
        x, memory = torch.randn(rows, 16), torch.randn(1, keys, 2, 4)
        torch.testing.assert_close(traced(x, memory), block(x, memory))
    assert not [node for node in traced.inlined_graph.nodes() if node.kind().startswith("mplug2_fast")]


FLOPS = {
    "layer_norm": 0,
    "linear_act": 1,
    "mlp": 1,
    "norm_linear_act": 1,
    "attention": 1,
    "local_temporal": 1,
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops_are_counted(name, native_module):
    op = ops.OPERATORS[name].op
    given = op.spec.inputs(op.spec.edge_cases[1])
    leaves = {n: v.requires_grad_() if n in op.spec.differentiable and v is not None else v for n, v in given.items()}
    with FlopCounterMode(display=False) as counter:
        results = as_tuple(op(*leaves.values()))
    forward = counter.get_total_flops()
    assert forward == FLOPS[name] * op.spec.flops(**given)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(results, [torch.ones_like(r) for r in results])
    assert counter.get_total_flops() == forward * (2.5 if name == "attention" else 2)


def test_nested_tensors(native_module):
    parts = [torch.randn(2, 16), torch.randn(5, 16)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for part, out in zip(parts, ops.linear_act(jagged, WEIGHT, BIAS).unbind(), strict=True):
        torch.testing.assert_close(out, ops.linear_act(part, WEIGHT, BIAS))
    with pytest.raises(TypeError, match=r"create them with layout=torch\.jagged"):
        ops.layer_norm(torch.nested.nested_tensor(parts))


def test_sizes_may_change_under_compile(native_module):
    given = ops.local_temporal.op.spec.inputs({"batch": 1, "frames": 2, "patches": 3, "channels": 8, "inner": 4})
    x, *others = given.values()
    compiled = torch.compile(lambda x: ops.local_temporal.op(x, *others), fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for tokens in (4, 9, 2):
            x = torch.randn(1, 2, tokens, 8)
            torch.testing.assert_close(compiled(x), ops.local_temporal.op(x, *others))
