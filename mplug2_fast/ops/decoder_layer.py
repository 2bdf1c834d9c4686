"""A layer of the text decoder for the newest token of every beam: self-attention, cross-attention, FFN, post-norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.attention import MAX_HEAD_DIM
from mplug2_fast.ops.beam_attention import beam_attention
from mplug2_fast.ops.beam_attention import make as make_memory
from mplug2_fast.ops.beam_attention import reference as beam_reference
from mplug2_fast.ops.layer_norm import norm_reference
from mplug2_fast.ops.linear_act import EAGER, FEW_ROWS, Activation, check_activation
from mplug2_fast.ops.residual import linear_residual, norm_linear_residual
from mplug2_fast.ops.runtime import cpu, triton
from mplug2_fast.ops.runtime.dispatch import Backend, Op
from mplug2_fast.ops.runtime.spec import Spec, normal
from mplug2_fast.ops.runtime.spec import upcast as in_float64
from mplug2_fast.ops.step_attention import check_states, step_attention
from mplug2_fast.ops.step_attention import make as make_states
from mplug2_fast.ops.step_attention import reference as step_reference

WeightAndBias = tuple[Tensor, Tensor | None]

# Each with a weight and a bias, in the order of the operator's arguments.
PARTS = ("norm", "qkv", "self_out", "self_norm", "query", "cross_out", "cross_norm", "fc", "proj")
NORMS = ("norm", "self_norm", "cross_norm")
_PARAMETERS = 2 * len(PARTS)


def reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    self_out_weight: Tensor,
    self_out_bias: Tensor | None,
    self_norm_weight: Tensor,
    self_norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    cross_out_weight: Tensor,
    cross_out_bias: Tensor | None,
    cross_norm_weight: Tensor,
    cross_norm_bias: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
    ancestors: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    key_padding_mask: Tensor | None,
    step: int,
    activation: Activation,
    eps: float,
    *,
    upcast: bool = False,
) -> Tensor:
    """What `decoder_layer` says, operation by operation."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm_reference(x, *up(weight, bias), eps)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, *up(weight, bias))

    up = in_float64 if upcast else lambda *tensors: tensors
    heads = memory_key.shape[1]
    n = norm(*up(x), norm_weight, norm_bias)
    new = _heads(linear(n, qkv_weight, qkv_bias), heads)
    context = step_reference(*new, keys, values, ancestors, step, upcast=upcast).view(x.shape)
    m = norm(n + linear(context, self_out_weight, self_out_bias), self_norm_weight, self_norm_bias)
    queries = linear(m, query_weight, query_bias).unflatten(-1, (heads, -1))
    context = beam_reference(queries, *up(memory_key, memory_value), key_padding_mask)
    c = norm(m + linear(context, cross_out_weight, cross_out_bias), cross_norm_weight, cross_norm_bias)
    return c + linear(EAGER[activation](linear(c, fc_weight, fc_bias)), proj_weight, proj_bias)


def make(
    generator: torch.Generator,
    *,
    batch: int,
    beams: int,
    length: int,
    step: int,
    keys: int,
    heads: int = 2,
    head_dim: int = 16,
    hidden: int = 48,
    activation: Activation = "gelu",
    masked: bool = False,
    biases: bool = True,
) -> dict[str, Any]:
    dim, made = heads * head_dim, {}
    outputs = {"qkv": 3 * dim, "fc": hidden}
    for name in PARTS:
        shape = (dim,) if name in NORMS else (outputs.get(name, dim), hidden if name == "proj" else dim)
        made[f"{name}_weight"] = normal(generator, *shape, scale=1.0 if name in NORMS else shape[-1] ** -0.5)
        made[f"{name}_bias"] = normal(generator, shape[0]) if biases or name in NORMS else None
    memory = make_memory(
        generator, batch=batch, queries=beams, keys=keys, heads=heads, head_dim=head_dim, masked=masked
    )
    states = make_states(generator, rows=batch * beams, length=length, step=step, heads=heads, head_dim=head_dim)
    return {
        "x": normal(generator, batch, beams, dim) * 2 + 0.5,
        **made,
        **{name: states[name] for name in ("keys", "values", "ancestors")},
        "memory_key": memory["key"],
        "memory_value": memory["value"],
        "key_padding_mask": memory["key_padding_mask"],
        "step": step,
        "activation": activation,
        "eps": 1e-5,
    }


def run_composed(x: Tensor, *others: Any) -> Tensor:
    """Operator by operator, each on the backend that serves it."""
    parameters, states, (key, value, mask), (step, activation, eps) = _split(others)
    norm, qkv, self_out, self_norm, query, cross_out, cross_norm, fc, proj = _pairs(parameters)
    projected, n = norm_linear_residual(x, *norm, *qkv, "none", eps)
    context = step_attention(*_heads(projected, key.shape[1]), *states, step=step)
    x = linear_residual(context.view(x.shape), *self_out, n)
    projected, m = norm_linear_residual(x, *self_norm, *query, "none", eps)
    projected = projected.unflatten(-1, (key.shape[1], -1))
    context = beam_attention(projected, key, value, key_padding_mask=mask)
    x = linear_residual(context, *cross_out, m)
    hidden, c = norm_linear_residual(x, *cross_norm, *fc, activation, eps)
    return linear_residual(hidden, *proj, c)


def run_cpu(x: Tensor, *others: Any) -> Tensor:
    parameters, (keys, values, ancestors), (key, value, mask), (step, activation, eps) = _split(others)
    x = x.contiguous()
    out = torch.empty_like(x)
    parameters = [None if p is None else p.contiguous() for p in parameters]
    mask = None if mask is None else mask.bool().contiguous()
    hidden = parameters[2 * PARTS.index("fc")].shape[0]
    cpu.module().decoder_layer(
        cpu.isa(),
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
        (*x.shape[:2], key.shape[1], key.shape[3], hidden, key.shape[2], step),
        x.data_ptr(),
        [cpu.address(p) for p in parameters],
        keys.data_ptr(),
        keys.stride()[:3],
        values.data_ptr(),
        values.stride()[:3],
        ancestors.data_ptr(),
        ancestors.stride(),
        key.data_ptr(),
        key.stride()[:3],
        value.data_ptr(),
        value.stride()[:3],
        cpu.address(mask),
        cpu.activation(activation),
        eps,
        out.data_ptr(),
    )
    return out


def cpu_reasons(x: Tensor, *others: Any) -> list[str]:
    parameters, (keys, values, _), (key, value, _), _ = _split(others)
    found = cpu.reasons(x, keys=keys, values=values, memory_key=key, memory_value=value)
    found += cpu.parameter_reasons(x, parameters)
    if key.shape[3] > MAX_HEAD_DIM:
        found.append(f"it is for heads of up to {MAX_HEAD_DIM} channels, not {key.shape[3]}")
    return found


def slower_than_composed(needs_grad: bool, x: Tensor, *others: Any) -> list[str]:
    rows = x.shape[0] * x.shape[1]
    if rows > FEW_ROWS:
        return [f"products of {rows} rows are oneDNN's: it is for up to {FEW_ROWS}"]
    return ["under autocast each operator chooses its type"] if torch.is_autocast_enabled("cpu") else []


def _split(others: Sequence[Any]) -> tuple[list[Any], list[Tensor], list[Any], list[Any]]:
    """All arguments but x: parameters; keys, values, ancestors; the memory's keys, values, mask; the others."""
    cuts = (_PARAMETERS, _PARAMETERS + 3, _PARAMETERS + 6)
    return (
        list(others[: cuts[0]]), list(others[cuts[0] : cuts[1]]), list(others[cuts[1] : cuts[2]]),
        list(others[cuts[2] :]),
    )  # fmt: skip


def _pairs(parameters: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(parameters[::2], parameters[1::2], strict=True))


def _heads(projected: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values `(rows, heads, head_dim)` of a projection `(batch, beams, 3·heads·head_dim)`."""
    return projected.flatten(0, 1).unflatten(-1, (3, heads, -1)).unbind(-3)


def flops(x: Tensor, keys: Tensor, memory_key: Tensor, step: int, **others: Any) -> int:
    weights = sum(others[f"{part}_weight"].numel() for part in PARTS if part not in NORMS)
    rows = x.shape[0] * x.shape[1]
    return 2 * rows * weights + 4 * x.numel() * (step + 1 + memory_key.shape[2])


def check(x: Tensor, *others: Any) -> None:
    parameters, states, (memory_key, memory_value, mask), (step, activation, _) = _split(others)
    if x.dim() != 3:
        raise ValueError(f"x must be (batch, beams, channels), got {tuple(x.shape)}")
    batch, beams, dim = x.shape
    if memory_key.dim() != 4 or memory_key.shape != memory_value.shape or memory_key.shape[0] != batch:
        raise ValueError(
            f"memory_key and memory_value must be ({batch}, heads, k_len, head_dim), got {tuple(memory_key.shape)} and "
            f"{tuple(memory_value.shape)}"
        )
    _, heads, k_len, head_dim = memory_key.shape
    if heads * head_dim != dim or not dim:
        raise ValueError(f"x has {dim} channels, the memory {heads} heads of {head_dim}")
    pairs = dict(zip(PARTS, _pairs(parameters), strict=True))
    hidden = pairs["fc"][0].shape[:1].numel()
    outputs = {"qkv": 3 * dim, "fc": hidden}
    for name, (weight, bias) in pairs.items():
        out_features = outputs.get(name, dim)
        wanted = (dim,) if name in NORMS else (out_features, hidden if name == "proj" else dim)
        if weight.shape != wanted or (bias is not None and bias.shape != (out_features,)):
            shape = None if bias is None else tuple(bias.shape)
            raise ValueError(
                f"{name} must be of shapes {wanted} and {(out_features,)}, got {tuple(weight.shape)} and {shape}"
            )
    if mask is not None and mask.shape != (batch, k_len):
        raise ValueError(f"key_padding_mask must be {(batch, k_len)}, got {tuple(mask.shape)}")
    check_activation(activation)
    check_states((batch * beams, heads, head_dim), *states, step)


SPEC = Spec(
    name="decoder_layer",
    axes={
        "x": "(batch, beams, channels), channels = heads·head_dim",
        "norm_weight": "(channels,), and so of the other norms and their biases",
        "qkv_weight": "(3·channels, channels)",
        "self_out_weight": "(channels, channels)",
        "query_weight": "(channels, channels)",
        "cross_out_weight": "(channels, channels)",
        "fc_weight": "(hidden, channels)",
        "proj_weight": "(channels, hidden)",
        "keys": "(batch·beams, heads, length, head_dim), written at `step`",
        "values": "(batch·beams, heads, length, head_dim), written at `step`",
        "ancestors": "(batch·beams, length), int32, written at `step`",
        "memory_key": "(batch, heads, k_len, head_dim)",
        "memory_value": "(batch, heads, k_len, head_dim)",
        "key_padding_mask": "(batch, k_len)",
        "result": "(batch, beams, channels)",
    },
    reference=reference,
    make=make,
    awkward=(
        {"batch": 1, "beams": 5, "length": 4, "step": 2, "keys": 19},
        {"batch": 2, "beams": 3, "length": 15, "step": 14, "keys": 65, "heads": 3, "head_dim": 20, "masked": True},
        {"batch": 3, "beams": 1, "length": 1, "step": 0, "keys": 1, "heads": 1, "head_dim": 33, "hidden": 7},
        {"batch": 2, "beams": 2, "length": 3, "step": 1, "keys": 9, "biases": False, "activation": "quick_gelu"},
        {"batch": 13, "beams": 5, "length": 2, "step": 1, "keys": 5, "hidden": 40},
        {"batch": 0, "beams": 5, "length": 3, "step": 1, "keys": 4},
    ),
    models={
        "base": {
            "batch": 1, "beams": 5, "length": 15, "step": 14, "keys": 3137, "heads": 12, "head_dim": 64, "hidden": 3072
        },
        "large": {
            "batch": 1, "beams": 5, "length": 15, "step": 14, "keys": 4097, "heads": 16, "head_dim": 64, "hidden": 4096
        },
    },
    flops=flops,
)  # fmt: skip

_SCHEMA = ", ".join(f"Tensor {part}_weight, Tensor{'' if part in NORMS else '?'} {part}_bias" for part in PARTS)

OP = Op(
    SPEC,
    f"(Tensor x, {_SCHEMA}, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) ancestors, Tensor memory_key, "
    "Tensor memory_value, Tensor? key_padding_mask, int step, str activation, float eps) -> Tensor",
    [
        Backend("cpu", run_cpu, cpu_reasons, devices=("cpu",), slower_reasons=slower_than_composed),
        Backend("triton", run_composed, lambda x, *_: triton.reasons(x), devices=triton.DEVICES),
        Backend("torch", run_composed, differentiable=True),
    ],
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    check=check,
)


@OP.public
def decoder_layer(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    qkv: WeightAndBias,
    self_out: WeightAndBias,
    self_norm: tuple[Tensor, Tensor],
    query: WeightAndBias,
    cross_out: WeightAndBias,
    cross_norm: tuple[Tensor, Tensor],
    fc: WeightAndBias,
    proj: WeightAndBias,
    keys: Tensor,
    values: Tensor,
    ancestors: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    step: int,
    activation: Activation = "gelu",
    key_padding_mask: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """A decoder layer for the token of position `step` of every beam, from the sums that go into the norm before it to
    those that go into the norm after it:

        n = norm(x),  m = self_norm(n + self_out(self-attention of qkv(n)))
        c = cross_norm(m + cross_out(attention of query(m) to the memory)),  the result is c + proj(activation(fc(c)))

    Args:
        x: `(batch, beams, channels)`.
        norm, qkv, self_out, self_norm, query, cross_out, cross_norm, fc, proj: weight and bias; `(outputs, inputs)` and
            `(outputs,)` of linear layers, whose bias may be None, `(channels,)` of norms. `qkv` has the outputs of
            queries, keys and values in this order.
        keys, values, ancestors: as `step_attention` has them, the row of a beam being batch·beams + beam; written at
            `step`.
        memory_key, memory_value: `(batch, heads, k_len, head_dim)`. key_padding_mask: `(batch, k_len)`, nonzero for
            tokens; None where nothing is padding.
        activation: `"none"`, `"gelu"` or `"quick_gelu"`. eps: of the norms.

    Returns `(batch, beams, channels)`, contiguous. There are no gradients.

    Raises:
        ValueError: shapes that do not go together, no such step, an unknown activation.
        TypeError: ancestors are not int32.
    """
    pairs = (norm, qkv, self_out, self_norm, query, cross_out, cross_norm, fc, proj)
    parameters = [parameter for weight, bias in pairs for parameter in (weight, bias)]
    return (  # type: ignore[return-value]
        x, *parameters, keys, values, ancestors, memory_key, memory_value, key_padding_mask, step, activation, eps
    )  # fmt: skip
