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
from mplug2_fast.ops.beam_attention_int8 import SPEC as BEAM_ATTENTION_INT8
from mplug2_fast.ops.beam_attention_int8 import beam_attention_int8, check_memory
from mplug2_fast.ops.layer_norm import layer_norm, norm_reference
from mplug2_fast.ops.linear_act import EAGER, FEW_ROWS, Activation, check_activation
from mplug2_fast.ops.linear_int8 import MOST_INPUTS, linear_int8, quantise_weight
from mplug2_fast.ops.linear_int8 import SPEC as LINEAR_INT8
from mplug2_fast.ops.quantise_memory import quantise_memory
from mplug2_fast.ops.residual import linear_residual, norm_linear_residual
from mplug2_fast.ops.runtime import cpu, triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.schema import WRITTEN
from mplug2_fast.ops.runtime.spec import Spec, normal
from mplug2_fast.ops.step_attention import SPEC as STEP_ATTENTION
from mplug2_fast.ops.step_attention import check_states, step_attention

WeightAndBias = tuple[Tensor, Tensor | None]
WithScale = tuple[Tensor, Tensor | None, Tensor]
"""An int8 weight, a bias, and the float32 scale of each row of the weight."""

PARTS = ("norm", "qkv", "self_out", "self_norm", "query", "cross_out", "cross_norm", "fc", "proj")
"""The parts with a weight and a bias, in the order of the operator's arguments."""
NORMS = ("norm", "self_norm", "cross_norm")
LINEAR = tuple(part for part in PARTS if part not in NORMS)
BITS = 16
"""Of the whole numbers that multiply 8-bit weights."""

_norms = attrgetter(*(f"{part}_{kind}" for part in NORMS for kind in ("weight", "bias")))
_weights = attrgetter(*(f"{part}_weight" for part in LINEAR))
_biases = attrgetter(*(f"{part}_bias" for part in LINEAR))


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
    memory_key: Annotated[Tensor, "(batch, heads, k_len, head_dim), or that of beam_attention_int8"]
    memory_value: Annotated[Tensor, "(batch, heads, k_len, head_dim), or that of beam_attention_int8"]
    key_padding_mask: Annotated[Tensor | None, "(batch, k_len)"]
    step: int
    activation: Activation
    eps: float
    qkv_scale: Annotated[Tensor | None, "(3·channels,), float32, of an int8 weight"] = None
    self_out_scale: Annotated[Tensor | None, "(channels,), float32, of an int8 weight"] = None
    query_scale: Annotated[Tensor | None, "(channels,), float32, of an int8 weight"] = None
    cross_out_scale: Annotated[Tensor | None, "(channels,), float32, of an int8 weight"] = None
    fc_scale: Annotated[Tensor | None, "(hidden,), float32, of an int8 weight"] = None
    proj_scale: Annotated[Tensor | None, "(channels,), float32, of an int8 weight"] = None
    memory_key_scale: Annotated[Tensor | None, "(batch, heads, k_len), float32"] = None
    memory_value_scale: Annotated[Tensor | None, "(batch, heads, k_len), float32"] = None

    def layer(self, part: str) -> WeightAndBias:
        return getattr(self, f"{part}_weight"), getattr(self, f"{part}_bias")

    def scale(self, part: str) -> Tensor | None:
        return getattr(self, f"{part}_scale", None)

    @property
    def is_int8(self) -> bool:
        return self.qkv_scale is not None

    @property
    def int8_memory(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Keys, their scales, values, their scales; None if they are not 8-bit numbers."""
        if self.memory_key_scale is None or self.memory_value_scale is None:
            return None
        return self.memory_key, self.memory_key_scale, self.memory_value, self.memory_value_scale

    @property
    def memory_sizes(self) -> tuple[int, int, int, int]:
        """Batch, heads, k_len and head_dim."""
        if self.memory_key_scale is not None:
            return *self.memory_key_scale.shape, self.memory_value.shape[4]
        return self.memory_key.shape

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
    int8: bool = False,
    int8_memory: bool = False,
) -> Arguments:
    dim, parameters = heads * head_dim, {}
    outputs = {"qkv": 3 * dim, "fc": hidden}
    for name in PARTS:
        shape = (dim,) if name in NORMS else (outputs.get(name, dim), hidden if name == "proj" else dim)
        parameters[f"{name}_weight"] = normal(generator, *shape, scale=1.0 if name in NORMS else shape[-1] ** -0.5)
        parameters[f"{name}_bias"] = normal(generator, shape[0]) if biases or name in NORMS else None
    for name in LINEAR if int8 else ():
        weight = parameters[f"{name}_weight"]
        parameters[f"{name}_weight"], parameters[f"{name}_scale"] = quantise_weight(weight)
    memory = BEAM_ATTENTION.make_inputs(
        generator, batch=batch, queries=beams, keys=keys, heads=heads, head_dim=head_dim, masked=masked
    )
    memory_key, memory_value, scales = memory.key, memory.value, {}
    if int8_memory:
        memory_key, key_scale, memory_value, value_scale = quantise_memory(
            memory_key.transpose(1, 2), memory_value.transpose(1, 2)
        )
        scales = {"memory_key_scale": key_scale, "memory_value_scale": value_scale}
    states = STEP_ATTENTION.make_inputs(
        generator, rows=batch * beams, length=length, step=step, heads=heads, head_dim=head_dim
    )
    return Arguments(
        x=normal(generator, batch, beams, dim) * 2 + 0.5,
        **parameters,
        keys=states.keys,
        values=states.values,
        ancestors=states.ancestors,
        memory_key=memory_key,
        memory_value=memory_value,
        key_padding_mask=memory.key_padding_mask,
        step=step,
        activation=activation,
        eps=1e-5,
        **scales,
    )


def check(a: Arguments) -> None:
    if a.x.dim() != 3:
        raise ValueError(f"x must be (batch, beams, channels), got {tuple(a.x.shape)}")
    batch, beams, dim = a.x.shape
    _check_memory(a, batch)
    _, heads, k_len, head_dim = a.memory_sizes
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
    _check_scales(a)
    mask = a.key_padding_mask
    if mask is not None and mask.shape != (batch, k_len):
        raise ValueError(f"key_padding_mask must be {(batch, k_len)}, got {tuple(mask.shape)}")
    check_activation(a.activation)
    check_states((batch * beams, heads, head_dim), a.keys, a.values, a.ancestors, a.step)


def _check_memory(a: Arguments, batch: int) -> None:
    key, value, scale = a.memory_key, a.memory_value, a.memory_key_scale
    if (scale is None) != (a.memory_value_scale is None):
        raise ValueError("either memory_key and memory_value have a scale or none of them")
    if (memory := a.int8_memory) is not None:
        if scale.dim() != 3 or value.dim() != 6:
            raise ValueError(
                "memory_key and memory_value with scales must be those of quantise_memory, got a scale "
                f"{tuple(scale.shape)} and values {tuple(value.shape)}"
            )
        check_memory(memory, (batch, scale.shape[1], value.shape[4]))
    elif key.dim() != 4 or key.shape != value.shape or key.shape[0] != batch:
        raise ValueError(
            f"memory_key and memory_value must be ({batch}, heads, k_len, head_dim), got {tuple(key.shape)} and "
            f"{tuple(value.shape)}"
        )


def _check_scales(a: Arguments) -> None:
    missing = [name for name in LINEAR if a.scale(name) is None]
    if missing and len(missing) < len(LINEAR):
        raise ValueError(f"either all linear layers have a scale or none: {', '.join(missing)} have none")
    for name in LINEAR:
        weight, scale = getattr(a, f"{name}_weight"), a.scale(name)
        if (weight.dtype == torch.int8) != (scale is not None):
            raise TypeError(f"{name} must have a scale if its weight is int8, and only then, got {weight.dtype}")
        if scale is None:
            continue
        if scale.dtype != torch.float32 or scale.shape != weight.shape[:1]:
            raise TypeError(
                f"the scale of {name} must be {tuple(weight.shape[:1])} in float32, got {tuple(scale.shape)} in "
                f"{scale.dtype}"
            )
        if weight.shape[1] > MOST_INPUTS:
            raise ValueError(f"{name} with an int8 weight has at most {MOST_INPUTS} inputs, got {weight.shape[1]}")


def reference(a: Arguments) -> Tensor:
    """`decoder_layer`, operation by operation."""

    def norm(x: Tensor, part: str) -> Tensor:
        return norm_reference(x, *a.layer(part), a.eps)

    def linear(x: Tensor, part: str) -> Tensor:
        if (scale := a.scale(part)) is not None:
            weight, bias = a.layer(part)
            return LINEAR_INT8.reference(x, weight, scale, bias, "none", None, BITS)
        return F.linear(x, *a.layer(part))

    n = norm(a.x, "norm")
    context = STEP_ATTENTION.reference(*a.heads(linear(n, "qkv")), a.keys, a.values, a.ancestors, a.step)
    m = norm(n + linear(context.view(a.x.shape), "self_out"), "self_norm")
    queries = linear(m, "query").unflatten(-1, (a.memory_key.shape[1], -1))
    if a.int8_memory is None:
        context = BEAM_ATTENTION.reference(queries, a.memory_key, a.memory_value, a.key_padding_mask)
    else:
        context = BEAM_ATTENTION_INT8.reference(queries, *a.int8_memory, a.key_padding_mask)
    c = norm(m + linear(context, "cross_out"), "cross_norm")
    return c + linear(EAGER[a.activation](linear(c, "fc")), "proj")


def run_composed(a: Arguments) -> Tensor:
    """Operator by operator, each on the backend that serves it."""

    def norm_linear(x: Tensor, norm: str, part: str, activation: Activation = "none") -> tuple[Tensor, Tensor]:
        if (scale := a.scale(part)) is not None:
            weight, bias = a.layer(part)
            normed = layer_norm(x, *a.layer(norm), eps=a.eps)
            return linear_int8(normed, weight, scale, bias, activation, bits=BITS), normed
        return norm_linear_residual(x, *a.layer(norm), *a.layer(part), activation, a.eps)

    def linear(x: Tensor, part: str, residual: Tensor) -> Tensor:
        if (scale := a.scale(part)) is not None:
            weight, bias = a.layer(part)
            return linear_int8(x, weight, scale, bias, residual=residual, bits=BITS)
        return linear_residual(x, *a.layer(part), residual)

    projected, n = norm_linear(a.x, "norm", "qkv")
    context = step_attention(*a.heads(projected), a.keys, a.values, a.ancestors, step=a.step)
    x = linear(context.view(a.x.shape), "self_out", n)
    projected, m = norm_linear(x, "self_norm", "query")
    projected = projected.unflatten(-1, (a.memory_key.shape[1], -1))
    if a.int8_memory is None:
        context = beam_attention(projected, a.memory_key, a.memory_value, key_padding_mask=a.key_padding_mask)
    else:
        context = beam_attention_int8(projected, *a.int8_memory, key_padding_mask=a.key_padding_mask)
    x = linear(context, "cross_out", m)
    hidden, c = norm_linear(x, "cross_norm", "fc", a.activation)
    return linear(hidden, "proj", c)


def run_cpu(a: Arguments) -> Tensor:
    x, key, value = a.x.contiguous(), a.memory_key, a.memory_value
    scales = [a.memory_key_scale, a.memory_value_scale]
    if a.int8_memory is not None:
        key, value = key.contiguous(), value.contiguous()
        scales = [None if scale is None else scale.contiguous() for scale in scales]
    _, heads, tokens, head_dim = a.memory_sizes
    out = torch.empty_like(x)
    parts = [part for name in PARTS for part in (*a.layer(name), a.scale(name))]
    parameters = [None if p is None else p.contiguous() for p in parts]
    mask = None if a.key_padding_mask is None else a.key_padding_mask.bool().contiguous()
    cpu.module().decoder_layer(
        cpu.isa(),
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
        (*x.shape[:2], heads, head_dim, a.fc_weight.shape[0], tokens, a.step),
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
        *map(cpu.address, scales),
        cpu.address(mask),
        cpu.activation(a.activation),
        a.eps,
        out.data_ptr(),
    )
    return out


def cpu_reasons(a: Arguments) -> list[str]:
    memory = {} if a.int8_memory is not None else {"memory_key": a.memory_key, "memory_value": a.memory_value}
    found = cpu.reasons(a.x, keys=a.keys, values=a.values, **memory)
    found += cpu.parameter_reasons(a.x, _norms(a) + _biases(a) + (() if a.is_int8 else _weights(a)))
    if (head_dim := a.memory_sizes[3]) > MAX_HEAD_DIM:
        found.append(f"the native kernel supports heads of up to {MAX_HEAD_DIM} channels, got {head_dim}")
    return found


def triton_reasons(a: Arguments) -> list[str]:
    narrow = a.is_int8 or a.int8_memory is not None
    return triton.reasons(a.x) + (["no Triton kernel multiplies 8-bit numbers"] if narrow else [])


def cpu_slower_reasons(needs_grad: bool, a: Arguments) -> list[str]:
    rows = a.x.shape[0] * a.x.shape[1]
    if rows > FEW_ROWS and not a.is_int8:
        return [f"oneDNN is faster for {rows} rows: the native kernel is for up to {FEW_ROWS}"]
    return ["autocast casts each operator by itself"] if torch.is_autocast_enabled("cpu") else []


def count_flops(a: Arguments) -> int:
    weights = sum(weight.numel() for weight in _weights(a))
    rows = a.x.shape[0] * a.x.shape[1]
    return 2 * rows * weights + 4 * a.x.numel() * (a.step + 1 + a.memory_sizes[2])


SPEC = Spec(
    name="decoder_layer",
    arguments=Arguments,
    results=("(batch, beams, channels)",),
    eager=reference,
    make_inputs=make_inputs,
    edge_cases=(
        {"batch": 1, "beams": 5, "length": 4, "step": 2, "keys": 19},
        {
            "batch": 2, "beams": 3, "length": 5, "step": 3, "keys": 33, "heads": 3, "head_dim": 20,
            "int8": True, "int8_memory": True,
        },
        {"batch": 2, "beams": 3, "length": 15, "step": 14, "keys": 65, "heads": 3, "head_dim": 20, "masked": True},
        {"batch": 3, "beams": 1, "length": 1, "step": 0, "keys": 1, "heads": 1, "head_dim": 33, "hidden": 7},
        {"batch": 2, "beams": 2, "length": 3, "step": 1, "keys": 9, "biases": False, "activation": "quick_gelu"},
        {"batch": 13, "beams": 5, "length": 2, "step": 1, "keys": 5, "hidden": 70, "biases": False, "int8": True},
        {"batch": 13, "beams": 5, "length": 2, "step": 1, "keys": 5, "hidden": 40},
        {"batch": 0, "beams": 5, "length": 3, "step": 1, "keys": 4},
        {"batch": 2, "beams": 7, "length": 3, "step": 2, "keys": 70, "masked": True, "int8_memory": True},
    ),
    models={
        "base": {
            "batch": 1, "beams": 5, "length": 15, "step": 14, "keys": 3137, "heads": 12, "head_dim": 64, "hidden": 3072
        },
        "large": {
            "batch": 1, "beams": 5, "length": 15, "step": 14, "keys": 4097, "heads": 16, "head_dim": 64, "hidden": 4096
        },
        "large, int8": {
            "batch": 1, "beams": 5, "length": 15, "step": 14, "keys": 4097, "heads": 16, "head_dim": 64,
            "hidden": 4096, "int8": True, "int8_memory": True,
        },
    },
    count_flops=count_flops,
    kept=(*(f"{name}_scale" for name in LINEAR), "memory_key_scale", "memory_value_scale"),
    rounding=lambda a: 2e-5 if a.is_int8 or a.int8_memory is not None else 0.0,
)  # fmt: skip

OP: Op[Tensor] = Op(
    SPEC,
    [
        Backend("cpu", run_cpu, cpu_reasons, devices=("cpu",), slower_reasons=cpu_slower_reasons),
        Backend("triton", run_composed, triton_reasons, devices=triton.DEVICES),
        Backend("torch", run_composed, differentiable=True),
    ],
    fake=lambda a: torch.empty_like(a.x, memory_format=torch.contiguous_format),
    check=check,
)


@OP.public
def decoder_layer(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    qkv: WeightAndBias | WithScale,
    self_out: WeightAndBias | WithScale,
    self_norm: tuple[Tensor, Tensor],
    query: WeightAndBias | WithScale,
    cross_out: WeightAndBias | WithScale,
    cross_norm: tuple[Tensor, Tensor],
    fc: WeightAndBias | WithScale,
    proj: WeightAndBias | WithScale,
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
    memory_key_scale: Tensor | None = None,
    memory_value_scale: Tensor | None = None,
) -> Tensor:
    """A decoder layer for the token at position `step` of each beam. Input and result are the sums before a norm.

        n = norm(x),  m = self_norm(n + self_out(self-attention of qkv(n)))
        c = cross_norm(m + cross_out(attention of query(m) to the memory)),  the result is c + proj(activation(fc(c)))

    Args:
        x: `(batch, beams, channels)`.
        norm, qkv, self_out, self_norm, query, cross_out, cross_norm, fc, proj: weight and bias. Those of linear layers
            are `(outputs, inputs)` and `(outputs,)`, the bias may be None. Those of norms are `(channels,)`. `qkv`
            outputs query, key and value, in this order. If the weights of linear layers are int8, a scale
            `(outputs,)`, float32, follows each bias; they compute what `linear_int8` does with 16 bits.
        keys, values, ancestors: as for `step_attention`; the row of a beam is batch·beams + beam.
        memory_key, memory_value: `(batch, heads, k_len, head_dim)`. key_padding_mask: `(batch, k_len)`, nonzero for
            tokens; None if there is no padding.
        memory_key_scale, memory_value_scale: of memory_key and memory_value, if they are those of `quantise_memory`.
        activation: `"none"`, `"gelu"` or `"quick_gelu"`. eps: of the norms.

    Returns `(batch, beams, channels)`, contiguous. There are no gradients.

    Raises:
        ValueError: mismatched shapes, a step outside the cache, an unknown activation, or a scale for some layers only.
        TypeError: ancestors are not int32, int8 weights have no float32 scale, or a memory with scales is not int8.
    """
    scales = [part[2] if len(part) == 3 else None for part in (qkv, self_out, query, cross_out, fc, proj)]
    return OP(
        x, *norm, *qkv[:2], *self_out[:2], *self_norm, *query[:2], *cross_out[:2], *cross_norm, *fc[:2], *proj[:2],
        keys, values, ancestors, memory_key, memory_value, key_padding_mask, step, activation, eps,
        *scales, memory_key_scale, memory_value_scale,
    )  # fmt: skip
