"""Self-attention of one new token per sequence, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.attention import scale_of
from mplug2_fast.ops.runtime import cpu, formula, triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.schema import WRITTEN
from mplug2_fast.ops.runtime.spec import Spec, normal


class Arguments(NamedTuple):
    query: Annotated[Tensor, "(rows, heads, head_dim)"]
    key: Annotated[Tensor, "(rows, heads, head_dim)"]
    value: Annotated[Tensor, "(rows, heads, head_dim)"]
    keys: Annotated[Tensor, "(rows, heads, length, head_dim)", WRITTEN]
    values: Annotated[Tensor, "(rows, heads, length, head_dim)", WRITTEN]
    ancestors: Annotated[Tensor, "(rows, length), int32", WRITTEN]
    step: int


def make_inputs(
    generator: torch.Generator, *, rows: int, length: int, step: int, heads: int = 2, head_dim: int = 16
) -> Arguments:
    query, key, value = normal(generator, rows, 3, heads, head_dim).unbind(1)
    keys, values = (normal(generator, rows, heads, length, head_dim) for _ in range(2))
    ancestors = torch.randint(max(1, rows), (rows, length), generator=generator, dtype=torch.int32)
    return Arguments(query, key, value, keys, values, ancestors, step)


def check(a: Arguments) -> None:
    if a.query.dim() != 3 or a.query.shape != a.key.shape or a.query.shape != a.value.shape:
        raise ValueError(
            "query, key and value must have one shape (rows, heads, head_dim), got "
            f"{tuple(a.query.shape)}, {tuple(a.key.shape)} and {tuple(a.value.shape)}"
        )
    check_states(a.query.shape, a.keys, a.values, a.ancestors, a.step)


def check_states(new: Sequence[int], keys: Tensor, values: Tensor, ancestors: Tensor, step: int) -> None:
    """Checks the cache for new tokens of shape `(rows, heads, head_dim)`, given as `new`."""
    rows, heads, head_dim = new
    if keys.dim() != 4 or keys.shape != values.shape or keys.shape != (rows, heads, keys.shape[2], head_dim):
        raise ValueError(
            f"keys and values must be ({rows}, {heads}, length, {head_dim}), got {tuple(keys.shape)} and "
            f"{tuple(values.shape)}"
        )
    if ancestors.shape != (rows, keys.shape[2]):
        raise ValueError(f"ancestors must be {(rows, keys.shape[2])}, got {tuple(ancestors.shape)}")
    if ancestors.dtype != torch.int32:
        raise TypeError(f"ancestors must be int32, got {ancestors.dtype}")
    if not 0 <= step < keys.shape[2]:
        raise ValueError(f"step must be from 0 to {keys.shape[2] - 1}, got {step}")


def _append(a: Arguments) -> tuple[Tensor, Tensor]:
    """Writes the new keys and values; returns those of all steps so far, `(rows, step + 1, heads, head_dim)`."""
    a.keys[:, :, a.step], a.values[:, :, a.step] = a.key, a.value
    a.ancestors[:, a.step] = torch.arange(len(a.ancestors), device=a.keys.device)
    position, origin = torch.arange(a.step + 1, device=a.keys.device), a.ancestors[:, : a.step + 1]
    return a.keys[origin, :, position], a.values[origin, :, position]


def reference(a: Arguments) -> Tensor:
    """softmax(query·keyᵀ / √head_dim)·value over the positions up to `step`."""
    keys, values = _append(a)
    scores = torch.einsum("rhd,rthd->rht", a.query, keys) * scale_of(a.query.shape[-1])
    return torch.einsum("rht,rthd->rhd", scores.softmax(dim=-1), values).flatten(1)


def run_torch(a: Arguments) -> Tensor:
    if a.ancestors.is_cpu and not formula.is_needed([a.ancestors]):  # on other devices the check would synchronise
        _check_ancestors(a.ancestors[:, : a.step])
    keys, values = (states.transpose(1, 2) for states in _append(a))
    return F.scaled_dot_product_attention(a.query[:, :, None], keys, values).flatten(1)


def _check_ancestors(ancestors: Tensor) -> None:
    if ((ancestors < 0) | (ancestors >= len(ancestors))).any():
        raise ValueError(f"step_attention: an ancestor is not one of the {len(ancestors)} rows")


def run_cpu(a: Arguments) -> Tensor:
    query, key, value, keys, values, ancestors, step = a
    if query.numel() == 0:
        return run_torch(a)
    rows, heads, head_dim = query.shape
    out = query.new_empty(rows, heads * head_dim)
    cpu.module().step_attention(
        cpu.isa(),
        query.dtype == torch.bfloat16,
        cpu.threads(query.numel() * (step + 1) // 8),
        (rows, heads, head_dim, step),
        query.data_ptr(),
        query.stride()[:2],
        key.data_ptr(),
        key.stride()[:2],
        value.data_ptr(),
        value.stride()[:2],
        keys.data_ptr(),
        keys.stride()[:3],
        values.data_ptr(),
        values.stride()[:3],
        ancestors.data_ptr(),
        ancestors.stride(),
        head_dim**-0.5,
        out.data_ptr(),
    )
    return out


def cpu_reasons(a: Arguments) -> list[str]:
    return cpu.reasons(a.query, key=a.key, value=a.value, keys=a.keys, values=a.values)


def run_triton(a: Arguments) -> Tensor:
    out = a.query.new_empty(a.query.shape[0], a.query.shape[1] * a.query.shape[2])
    if out.numel():
        triton.kernels("step_attention").forward(*a, out)
    return out


def triton_reasons(a: Arguments) -> list[str]:
    return triton.reasons(a.query, key=a.key, value=a.value, keys=a.keys, values=a.values)


SPEC = Spec(
    name="step_attention",
    arguments=Arguments,
    results=("(rows, heads·head_dim)",),
    eager=reference,
    make_inputs=make_inputs,
    edge_cases=(
        {"rows": 5, "length": 7, "step": 3},
        {"rows": 3, "length": 15, "step": 14, "heads": 3, "head_dim": 64},
        {"rows": 1, "length": 1, "step": 0},
        {"rows": 4, "length": 33, "step": 32, "heads": 1, "head_dim": 33},
        {"rows": 0, "length": 3, "step": 1},
        {"rows": 2, "length": 3, "step": 1, "head_dim": 0},
    ),
    models={
        "base": {"rows": 5, "length": 15, "step": 14, "heads": 12, "head_dim": 64},
        "large": {"rows": 5, "length": 15, "step": 14, "heads": 16, "head_dim": 64},
        "large, steps of 32 videos": {"rows": 160, "length": 15, "step": 14, "heads": 16, "head_dim": 64},
    },
    count_flops=lambda a: 4 * a.query.numel() * (a.step + 1),
)

OP: Op[Tensor] = Op(
    SPEC,
    [
        Backend("cpu", run_cpu, cpu_reasons, devices=("cpu",)),
        Backend("triton", run_triton, triton_reasons, devices=triton.DEVICES),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=lambda a: a.query.new_empty(a.query.shape[0], a.query.shape[1] * a.query.shape[2]),
    check=check,
)


@OP.public
def step_attention(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, ancestors: Tensor, *, step: int
) -> Tensor:
    """Attention from the token at position `step` of each sequence to itself and to the tokens before it.

    Reordering beams permutes `ancestors`; the cache is not moved. Inside the Triton kernels' `overlapped` context, the
    cache and `ancestors` must have been written before the context began.

    Args:
        query, key, value: `(rows, heads, head_dim)`, of the new tokens.
        keys, values: `(rows, heads, length, head_dim)`, the cache of all positions. The new ones are written at `step`.
        ancestors: `(rows, length)`, int32. For t < step, [i, t] is the row of the cache that holds token t of sequence
            i. i is written at [i, step].

    Returns `(rows, heads·head_dim)`, contiguous.

    Raises:
        ValueError: mismatched shapes, or a step outside the cache.
        TypeError: ancestors are not int32.
    """
    return OP(query, key, value, keys, values, ancestors, step)
