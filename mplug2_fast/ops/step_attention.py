"""Self-attention of one new token of every sequence, whose key and value join those that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.runtime import cpu, formula, triton
from mplug2_fast.ops.runtime.dispatch import Backend, Op
from mplug2_fast.ops.runtime.spec import Spec, normal
from mplug2_fast.ops.runtime.spec import upcast as in_float64


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    ancestors: Tensor,
    step: int,
    *,
    upcast: bool = False,
) -> Tensor:
    """softmax(query·keyᵀ / √head_dim)·value over the positions up to `step`."""
    keys, values = _appended(key, value, keys, values, ancestors, step)
    if upcast:
        query, keys, values = in_float64(query, keys, values)
    scores = torch.einsum("rhd,rthd->rht", query, keys) * query.shape[-1] ** -0.5
    return torch.einsum("rht,rthd->rhd", scores.softmax(dim=-1), values).flatten(1)


def make(
    generator: torch.Generator, *, rows: int, length: int, step: int, heads: int = 2, head_dim: int = 16
) -> dict[str, Any]:
    projected = normal(generator, rows, 3, heads, head_dim)
    return {
        **dict(zip(("query", "key", "value"), projected.unbind(1), strict=True)),
        "keys": normal(generator, rows, heads, length, head_dim),
        "values": normal(generator, rows, heads, length, head_dim),
        "ancestors": torch.randint(max(1, rows), (rows, length), generator=generator, dtype=torch.int32),
        "step": step,
    }


def _appended(key, value, keys, values, ancestors, step) -> tuple[Tensor, Tensor]:
    """Stores the new ones; keys and values of all steps so far, `(rows, step + 1, heads, head_dim)`."""
    keys[:, :, step], values[:, :, step] = key, value
    ancestors[:, step] = torch.arange(len(ancestors), device=keys.device)
    position, origin = torch.arange(step + 1, device=keys.device), ancestors[:, : step + 1]
    return keys[origin, :, position], values[origin, :, position]


def run_torch(query, *others) -> Tensor:
    *_, ancestors, step = others
    if ancestors.is_cpu and not formula.is_needed([ancestors]):  # of other devices it would be waited for
        _check_ancestors(ancestors[:, :step])
    keys, values = (states.transpose(1, 2) for states in _appended(*others))
    return F.scaled_dot_product_attention(query[:, :, None], keys, values).flatten(1)


def _check_ancestors(ancestors: Tensor) -> None:
    if ((ancestors < 0) | (ancestors >= len(ancestors))).any():
        raise ValueError(f"step_attention: an ancestor is not one of the {len(ancestors)} rows")


def run_cpu(query, key, value, keys, values, ancestors, step) -> Tensor:
    if query.numel() == 0:
        return run_torch(query, key, value, keys, values, ancestors, step)
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


def cpu_reasons(query, key, value, keys, values, ancestors, step) -> list[str]:
    return cpu.reasons(query, key=key, value=value, keys=keys, values=values)


def run_triton(query, key, value, keys, values, ancestors, step) -> Tensor:
    out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
    if out.numel():
        triton.kernels("step_attention").forward(query, key, value, keys, values, ancestors, step, out)
    return out


def triton_reasons(query, key, value, keys, values, ancestors, step) -> list[str]:
    return triton.reasons(query, key=key, value=value, keys=keys, values=values)


def check_states(new: Sequence[int], keys: Tensor, values: Tensor, ancestors: Tensor, step: int) -> None:
    """Raises what `step_attention` does, for new tokens of shape `(rows, heads, head_dim)`."""
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
        raise ValueError(f"there is no step {step} among {keys.shape[2]}")


def check(query, key, value, keys, values, ancestors, step) -> None:
    if query.dim() != 3 or query.shape != key.shape or query.shape != value.shape:
        raise ValueError(
            "query, key and value must be (rows, heads, head_dim), all the same, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    check_states(query.shape, keys, values, ancestors, step)


SPEC = Spec(
    name="step_attention",
    axes={
        "query": "(rows, heads, head_dim)",
        "key": "(rows, heads, head_dim)",
        "value": "(rows, heads, head_dim)",
        "keys": "(rows, heads, length, head_dim), written at `step`",
        "values": "(rows, heads, length, head_dim), written at `step`",
        "ancestors": "(rows, length), int32, written at `step`",
        "result": "(rows, heads·head_dim)",
    },
    reference=reference,
    make=make,
    awkward=(
        {"rows": 5, "length": 7, "step": 3},
        {"rows": 3, "length": 15, "step": 14, "heads": 3, "head_dim": 64},
        {"rows": 1, "length": 1, "step": 0},
        {"rows": 4, "length": 33, "step": 32, "heads": 1, "head_dim": 33},
        {"rows": 0, "length": 3, "step": 1},
    ),
    models={
        "base": {"rows": 5, "length": 15, "step": 14, "heads": 12, "head_dim": 64},
        "large": {"rows": 5, "length": 15, "step": 14, "heads": 16, "head_dim": 64},
        "large, steps of 32 videos": {"rows": 160, "length": 15, "step": 14, "heads": 16, "head_dim": 64},
    },
    flops=lambda query, step, **_: 4 * query.numel() * (step + 1),
)

OP = Op(
    SPEC,
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) ancestors, int step) "
    "-> Tensor",
    [
        Backend("cpu", run_cpu, cpu_reasons, devices=("cpu",)),
        Backend("triton", run_triton, triton_reasons, devices=triton.DEVICES),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=lambda query, *_: query.new_empty(query.shape[0], query.shape[1] * query.shape[2]),
    check=check,
)


@OP.public
def step_attention(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, ancestors: Tensor, *, step: int
) -> Tensor:
    """Attention of the token of position `step` of every sequence to itself and to those before it.

    Sequences that are permuted, as beams are, leave their keys and values where they lie, and permute the table that
    tells where. Within `overlapped` of the kernels, states and table must be older than that context.

    Args:
        query, key, value: `(rows, heads, head_dim)`, of the new tokens.
        keys, values: `(rows, heads, length, head_dim)`, those of all positions; the new ones are written at `step`.
        ancestors: `(rows, length)` int32, at [i, t] for t < step the row of keys and values in which the token t of
            sequence i lies; i is written at [i, step].

    Returns `(rows, heads·head_dim)`, contiguous.

    Raises:
        ValueError: shapes that do not go together, or no such step.
        TypeError: ancestors are not int32.
    """
    return query, key, value, keys, values, ancestors, step  # type: ignore[return-value]
