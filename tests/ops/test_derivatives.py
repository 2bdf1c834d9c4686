"""Every transform of torch.func and of autograd gives the derivative of the formula, or raises."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad

from mplug2_fast import ops
from mplug2_fast.errors import BackendError
from tests.ops.suite import as_tuple

SIZES = {
    "add_layer_norm": {"rows": (3, 2), "channels": 5, "scale": 0.5},
    "attention": {"batch": 2, "queries": 4, "keys": 4, "head_dim": 8, "causal": True},
    "attention, masked": {"batch": 3, "queries": 3, "keys": 5, "head_dim": 8, "masked": True},
    "beam_attention": {"batch": 2, "queries": 3, "keys": 5, "head_dim": 8, "masked": True},
    "layer_norm": {"rows": (3, 2), "channels": 5},
    "linear_act": {"rows": (3, 2), "inputs": 5, "outputs": 4, "activation": "gelu", "residual": True},
    "local_temporal": {"batch": 1, "frames": 3, "patches": 2, "channels": 6, "inner": 4},
    "mlp": {"rows": (3, 2), "channels": 5, "hidden": 7},
    "norm_linear_act": {"rows": (3, 2), "inputs": 5, "outputs": 4, "activation": "quick_gelu"},
}
CLOSE = {"rtol": 2e-3, "atol": 2e-3}
Case = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]


@pytest.fixture(params=SIZES)
def case(request, native_module) -> Case:
    """A number computed by the operator, the same by its reference in float64, and what both depend on."""
    op = ops.OPERATORS[request.param.split(",")[0]].op
    given = op.spec.inputs(SIZES[request.param])
    names = [name for name in op.spec.differentiable if given[name] is not None]

    def number(function: Callable[..., Any], dtype: torch.dtype, tensors: tuple[Tensor, ...]) -> Tensor:
        others = {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in given.items()}
        values = {**others, **dict(zip(names, (t.to(dtype) for t in tensors), strict=True))}
        return sum((out**3).sum() for out in as_tuple(function(*values.values()))).to(torch.float64)

    return (
        lambda *tensors: number(op, torch.float32, tensors),
        lambda *tensors: number(op.spec.reference, torch.float64, tensors),
        tuple(given[name].nan_to_num() for name in names),
    )


def directions(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(t.shape, generator=generator) for t in tensors)


def close(actual: Any, expected: Any) -> None:
    for one, other in zip(actual, expected, strict=True):
        scale = other.abs().max().clamp(min=1)
        torch.testing.assert_close(one.double() / scale, other.double() / scale, **CLOSE)


def test_forward_mode(case):
    ours, reference, tensors = case
    (_, tangent), (_, expected) = (func.jvp(f, tensors, directions(tensors)) for f in (ours, reference))
    close([tangent], [expected])
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, directions(tensors), strict=True)]
        close([forward_ad.unpack_dual(ours(*duals)).tangent], [expected])


def test_gradients_of_gradients(case):
    ours, reference, tensors = case
    every = tuple(range(len(tensors)))

    def products(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return func.jvp(func.grad(f, every), tensors, directions(tensors))[1]

    def penalties(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        def penalty(*given: Tensor) -> Tensor:
            found = func.grad(f, every)(*given)
            return sum((g * d).sum() for g, d in zip(found, directions(tensors), strict=True))

        return func.grad(penalty, every)(*tensors)

    close(products(ours), products(reference))
    close(penalties(ours), penalties(reference))


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_double_backward(case, backend):
    ours, reference, tensors = case

    def penalised(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        penalty = sum((g * d).sum() for g, d in zip(first, directions(tensors), strict=True))
        return torch.autograd.grad(penalty, leaves)

    with nullcontext() if backend is None else ops.use_backend(backend):
        found = penalised(ours)
    close(found, penalised(reference))


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_many_gradients_at_once(case, backend):
    ours, reference, tensors = case

    def batched(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        grads = torch.tensor([1.0, -2.0], dtype=torch.float64)
        return torch.autograd.grad(f(*leaves), leaves, grads, is_grads_batched=True)

    with nullcontext() if backend is None else ops.use_backend(backend):
        found = batched(ours)
    close(found, batched(reference))


def test_gradients_of_each_sample(case):
    ours, reference, tensors = case
    batches = tuple(torch.stack([t, t + d]) for t, d in zip(tensors, directions(tensors), strict=True))
    every = tuple(range(len(tensors)))
    close(func.vmap(func.grad(ours, every))(*batches), func.vmap(func.grad(reference, every))(*batches))
    close(func.functionalize(func.vmap(ours))(*batches)[None], func.vmap(reference)(*batches)[None])


def test_inference_mode(native_module):
    with torch.inference_mode():
        out = ops.layer_norm(torch.randn(3, 16))
    assert out.is_inference()


def test_registered_operators_refuse_forward_mode():
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.ops.mplug2_fast.layer_norm(forward_ad.make_dual(torch.randn(3, 8), torch.ones(3, 8)), None, None, 1e-5)


def test_a_forced_kernel_refuses_transforms(native_module):
    x = torch.randn(2, 3, 8)
    with ops.use_backend("cpu"), pytest.raises(BackendError, match=r"a transform of torch\.func is active"):
        func.vmap(ops.layer_norm)(x)


def test_operators_without_gradients_give_those_of_the_formula(native_module):
    """The derivative is right, or the call raises: a silently lost one is the worst case."""
    given = ops.step_attention.op.spec.inputs({"rows": 3, "length": 4, "step": 2})
    given["query"].requires_grad_()
    states = {name: given[name].clone() for name in ("keys", "values", "ancestors")}
    out = ops.step_attention.op(*{**given, **states}.values())
    (gradient,) = torch.autograd.grad(out.square().sum(), given["query"])
    (expected,) = torch.autograd.grad(ops.step_attention.op.spec.reference(**given).square().sum(), given["query"])
    torch.testing.assert_close(gradient, expected)
    with pytest.raises(BackendError, match="has no gradients"):
        torch.ops.mplug2_fast.step_attention(*given.values())
