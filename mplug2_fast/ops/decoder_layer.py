"""One layer of the text decoder for the newest token of each beam: self-attention, cross-attention, FFN, post-norm."""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.attention import MAX_HEAD_DIM
from mplug2_fast.ops.beam_attention import SPEC as BEAM_ATTENTION
from mplug2_fast.ops.beam_attention import beam_attention
from mplug2_fast.ops.layer_norm import norm_reference
from mplug2_fast.ops.linear_act import EAGER, FEW_ROWS, Activation, check_activation
from mplug2_fast.ops.residual import linear_residual, norm_linear_residual
from mplug2_fast.ops.runtime import cpu, triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.schema import WRITTEN
from mplug2_fast.ops.runtime.spec import Spec, normal
from mplug2_fast.ops.step_attention import SPEC as STEP_ATTENTION
from mplug2_fast.ops.step_attention import check_states, step_attention

WeightAndBias = tuple[Tensor, Tensor | None]

PARTS = ("norm", "qkv", "self_out", "self_norm", "query", "cross_out", "cross_norm", "fc", "proj")
"""The parts with a weight and a bias, in the order of the operator's arguments."""
NORMS = ("norm", "self_norm", "cross_norm")

_parameters = attrgetter(*(f"{part}_{kind}" for part in PARTS for kind in ("weight", "bias")))


class Arguments(NamedTuple):
    x: Annotated[Tensor, "(batch, beams, channels), channels = heads·head_dim"]
    norm_weight: Annotated[Tensor, "(channels,)"]
    norm_bias: Annotated[Tensor, "(channels,)"]
    qkv_weight: Annotated[Tensor, "(3·channels, channels)"]
    qkv_bias: Annotated[Tensor | None, "(3·channels,)"]
    self_out_weight: Annotated[Tensor, "(channels, channels)"]
    self_out_bias: Annotated[Tensor | None, "(channels,)"]
    self_norm_weight: Annotated[Tensor, "(channels,)"]
    self_norm_bias: Annotated[Tensor, "(channels,)"]
    query_weight: Annotated[Tensor, "(channels, channels)"]
    query_bias: Annotated[Tensor | None, "(channels,)"]
    cross_out_weight: Annotated[Tensor, "(channels, channels)"]
    cross_out_bias: Annotated[Tensor | None, "(channels,)"]
    cross_norm_weight: Annotated[Tensor, "(channels,)"]
    cross_norm_bias: Annotated[Tensor, "(channels,)"]
    fc_weight: Annotated[Tensor, "(hidden, channels)"]
    fc_bias: Annotated[Tensor | None, "(hidden,)"]
    proj_weight: Annotated[Tensor, "(channels, hidden)"]
    proj_bias: Annotated[Tensor | None, "(channels,)"]
    keys: Annotated[Tensor, "(batch·beams, heads, length, head_dim)", WRITTEN]
    values: Annotated[Tensor, "(batch·beams, heads, length, head_dim)", WRITTEN]
    ancestors: Annotated[Tensor, "(batch·beams, length), int32", WRITTEN]
    memory_key: Annotated[Tensor, "(batch, heads, k_len, head_dim)"]
    memory_value: Annotated[Tensor, "(batch, heads, k_len, head_dim)"]
    key_padding_mask: Annotated[Tensor | None, "(batch, k_len)"]
    step: int
    activation: Activation
    eps: float

    def layer(self, part: str) -> WeightAndBias:
        return getattr(self, f"{part}_weight"), getattr(self, f"{part}_bias")

    def heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value `(rows, heads, head_dim)` of a projection `(batch, beams, 3·heads·head_dim)`."""
        return projected.flatten(0, 1).unflatten(-1, (3, self.memory_key.shape[1], -1)).unbind(-3)


def make_inputs(
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
) -> Arguments:
    dim, parameters = heads * head_dim, {}
    outputs = {"qkv": 3 * dim, "fc": hidden}
    for name in PARTS:
        shape = (dim,) if name in NORMS else (outputs.get(name, dim), hidden if name == "proj" else dim)
        parameters[f"{name}_weight"] = normal(generator, *shape, scale=1.0 if name in NORMS else shape[-1] ** -0.5)
        parameters[f"{name}_bias"] = normal(generator, shape[0]) if biases or name in NORMS else None
    memory = BEAM_ATTENTION.make_inputs(
        generator, batch=batch, queries=beams, keys=keys, heads=heads, head_dim=head_dim, masked=masked
    )
    states = STEP_ATTENTION.make_inputs(
        generator, rows=batch * beams, length=length, step=step, heads=heads, head_dim=head_dim
    )
    return Arguments(
        x=normal(generator, batch, beams, dim) * 2 + 0.5,
        **parameters,
        keys=states.keys,
        values=states.values,
        ancestors=states.ancestors,
        memory_key=memory.key,
        memory_value=memory.value,
        key_padding_mask=memory.key_padding_mask,
        step=step,
        activation=activation,
        eps=1e-5,
    )


def check(a: Arguments) -> None:
    if a.x.dim() != 3:
        raise ValueError(f"x must be (batch, beams, channels), got {tuple(a.x.shape)}")
    batch, beams, dim = a.x.shape
    memory = a.memory_key.shape
    if len(memory) != 4 or memory != a.memory_value.shape or memory[0] != batch:
        raise ValueError(
            f"memory_key and memory_value must be ({batch}, heads, k_len, head_dim), got {tuple(memory)} and "
            f"{tuple(a.memory_value.shape)}"
        )
    _, heads, k_len, head_dim = memory
    if heads * head_dim != dim or not dim:
        raise ValueError(f"x must have heads·head_dim channels, got {dim} channels and {heads} heads of {head_dim}")
    hidden = a.fc_weight.shape[:1].numel()
    outputs = {"qkv": 3 * dim, "fc": hidden}
    for name in PARTS:
        weight, bias = a.layer(name)
        out_features = outputs.get(name, dim)
        wanted = (dim,) if name in NORMS else (out_features, hidden if name == "proj" else dim)
        if weight.shape != wanted or (bias is not None and bias.shape != (out_features,)):
            shape = None if bias is None else tuple(bias.shape)
            raise ValueError(
                f"{name} must have shapes {wanted} and {(out_features,)}, got {tuple(weight.shape)} and {shape}"
            )
    mask = a.key_padding_mask
    if mask is not None and mask.shape != (batch, k_len):
        raise ValueError(f"key_padding_mask must be {(batch, k_len)}, got {tuple(mask.shape)}")
    check_activation(a.activation)
    check_states((batch * beams, heads, head_dim), a.keys, a.values, a.ancestors, a.step)


def reference(a: Arguments) -> Tensor:
    """`decoder_layer`, operation by operation."""

    def norm(x: Tensor, part: str) -> Tensor:
        return norm_reference(x, *a.layer(part), a.eps)

    def linear(x: Tensor, part: str) -> Tensor:
        return F.linear(x, *a.layer(part))

    n = norm(a.x, "norm")
    context = STEP_ATTENTION.reference(*a.heads(linear(n, "qkv")), a.keys, a.values, a.ancestors, a.step)
    m = norm(n + linear(context.view(a.x.shape), "self_out"), "self_norm")
    queries = linear(m, "query").unflatten(-1, (a.memory_key.shape[1], -1))
    context = BEAM_ATTENTION.reference(queries, a.memory_key, a.memory_value, a.key_padding_mask)
    c = norm(m + linear(context, "cross_out"), "cross_norm")
    return c + linear(EAGER[a.activation](linear(c, "fc")), "proj")


def run_composed(a: Arguments) -> Tensor:
    """Operator by operator, each on the backend that serves it."""

    def norm_linear(x: Tensor, norm: str, linear: str, activation: Activation = "none") -> tuple[Tensor, Tensor]:
        return norm_linear_residual(x, *a.layer(norm), *a.layer(linear), activation, a.eps)

    projected, n = norm_linear(a.x, "norm", "qkv")
    context = step_attention(*a.heads(projected), a.keys, a.values, a.ancestors, step=a.step)
    x = linear_residual(context.view(a.x.shape), *a.layer("self_out"), n)
    projected, m = norm_linear(x, "self_norm", "query")
    projected = projected.unflatten(-1, (a.memory_key.shape[1], -1))
    context = beam_attention(projected, a.memory_key, a.memory_value, key_padding_mask=a.key_padding_mask)
    x = linear_residual(context, *a.layer("cross_out"), m)
    hidden, c = norm_linear(x, "cross_norm", "fc", a.activation)
    return linear_residual(hidden, *a.layer("proj"), c)


def run_cpu(a: Arguments) -> Tensor:
    x, key, value = a.x.contiguous(), a.memory_key, a.memory_value
    out = torch.empty_like(x)
    parameters = [None if p is None else p.contiguous() for p in _parameters(a)]
    mask = None if a.key_padding_mask is None else a.key_padding_mask.bool().contiguous()
    cpu.module().decoder_layer(
        cpu.isa(),
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
        (*x.shape[:2], key.shape[1], key.shape[3], a.fc_weight.shape[0], key.shape[2], a.step),
        x.data_ptr(),
        [cpu.address(p) for p in parameters],
        a.keys.data_ptr(),
        a.keys.stride()[:3],
        a.values.data_ptr(),
        a.values.stride()[:3],
        a.ancestors.data_ptr(),
        a.ancestors.stride(),
        key.data_ptr(),
        key.stride()[:3],
        value.data_ptr(),
        value.stride()[:3],
        cpu.address(mask),
        cpu.activation(a.activation),
        a.eps,
        out.data_ptr(),
    )
    return out


def cpu_reasons(a: Arguments) -> list[str]:
    found = cpu.reasons(a.x, keys=a.keys, values=a.values, memory_key=a.memory_key, memory_value=a.memory_value)
    found += cpu.parameter_reasons(a.x, _parameters(a))
    if (head_dim := a.memory_key.shape[3]) > MAX_HEAD_DIM:
        found.append(f"the native kernel supports heads of up to {MAX_HEAD_DIM} channels, got {head_dim}")
    return found


def cpu_slower_reasons(needs_grad: bool, a: Arguments) -> list[str]:
    rows = a.x.shape[0] * a.x.shape[1]
    if rows > FEW_ROWS:
        return [f"oneDNN is faster for {rows} rows: the native kernel is for up to {FEW_ROWS}"]
    return ["autocast casts each operator by itself"] if torch.is_autocast_enabled("cpu") else []


def count_flops(a: Arguments) -> int:
    weights = sum(a.layer(part)[0].numel() for part in PARTS if part not in NORMS)
    rows = a.x.shape[0] * a.x.shape[1]
    return 2 * rows * weights + 4 * a.x.numel() * (a.step + 1 + a.memory_key.shape[2])


SPEC = Spec(
    name="decoder_layer",
    arguments=Arguments,
    results=("(batch, beams, channels)",),
    eager=reference,
    make_inputs=make_inputs,
    edge_cases=(
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
    count_flops=count_flops,
)  # fmt: skip

OP: Op[Tensor] = Op(
    SPEC,
    [
        Backend("cpu", run_cpu, cpu_reasons, devices=("cpu",), slower_reasons=cpu_slower_reasons),
        Backend("triton", run_composed, lambda a: triton.reasons(a.x), devices=triton.DEVICES),
        Backend("torch", run_composed, differentiable=True),
    ],
    fake=lambda a: torch.empty_like(a.x, memory_format=torch.contiguous_format),
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
    """A decoder layer for the token at position `step` of each beam. Input and result are the sums before a norm.

        n = norm(x),  m = self_norm(n + self_out(self-attention of qkv(n)))
        c = cross_norm(m + cross_out(attention of query(m) to the memory)),  the result is c + proj(activation(fc(c)))

    Args:
        x: `(batch, beams, channels)`.
        norm, qkv, self_out, self_norm, query, cross_out, cross_norm, fc, proj: weight and bias. Those of linear layers
            are `(outputs, inputs)` and `(outputs,)`, the bias may be None. Those of norms are `(channels,)`. `qkv`
            outputs query, key and value, in this order.
        keys, values, ancestors: as for `step_attention`; the row of a beam is batch·beams + beam.
        memory_key, memory_value: `(batch, heads, k_len, head_dim)`. key_padding_mask: `(batch, k_len)`, nonzero for
            tokens; None if there is no padding.
        activation: `"none"`, `"gelu"` or `"quick_gelu"`. eps: of the norms.

    Returns `(batch, beams, channels)`, contiguous. There are no gradients.

    Raises:
        ValueError: mismatched shapes, a step outside the cache, or an unknown activation.
        TypeError: ancestors are not int32.
    """
    return OP(
        x, *norm, *qkv, *self_out, *self_norm, *query, *cross_out, *cross_norm, *fc, *proj, keys, values, ancestors,
        memory_key, memory_value, key_padding_mask, step, activation, eps,
    )  # fmt: skip
