"""The three-way tolerance: our error against float64 is at most twice that of the same-dtype eager code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# float32: the spread of summation orders; the others: at most half a unit in the last place of the result.
NOISE_FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 4.9e-4}


def relative(actual: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm; absolute where the exact value is smaller than 1 (or zero)."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    if exact.numel() == 0:
        return 0.0
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1.0)).item()


def assert_three_way(
    ours: Callable[..., Tensor], eager: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Compares ours with eager, both in dtype, against eager in float64 on the same rounded inputs; then the gradients
    of a random projection of the result with respect to every input."""
    rounded = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    exact_inputs = {name: tensor.double() for name, tensor in rounded.items()}
    exact = eager(**exact_inputs)
    with torch.no_grad():
        bound = 2 * relative(eager(**rounded), exact) + NOISE_FLOOR[dtype]
        error = relative(ours(**rounded), exact)
    assert error <= bound, f"forward: {error:.2e} > {bound:.2e}"

    direction = torch.randn(exact.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    gradients = []
    for function, given in ((eager, exact_inputs), (eager, rounded), (ours, rounded)):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
        out = function(**leaves)
        out.backward(direction.to(out.dtype))
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    exact_gradients, eager_gradients, our_gradients = gradients
    for name, exact_gradient in exact_gradients.items():
        bound = 2 * relative(eager_gradients[name], exact_gradient) + NOISE_FLOOR[dtype]
        error = relative(our_gradients[name], exact_gradient)
        assert error <= bound, f"gradient of {name}: {error:.2e} > {bound:.2e}"
