"""Layer norms, linear layers, multi-head attention and CLIP's MLP, as PyTorch has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.acceleration import gain, trial
from mplug2_fast.acceleration.products import keep_packed, product
from mplug2_fast.acceleration.structure import has, is_plain, require, require_linear, require_one_axis
from mplug2_fast.acceleration.swap import Kind, State, Unserved, Unsuitable
from mplug2_fast.ops import attention_with_dropout, layer_norm, mlp
from mplug2_fast.ops.linear_act import EAGER, Activation

ACTIVATIONS = {name: EAGER[name] for name in ("quick_gelu", "gelu")}


@dataclass(frozen=True)
class FoundNorm:
    """What the norm does with inputs in half precision: plain, as PyTorch's does where the parameters have their type;
    casts, it computes in float32 with parameters in float32, and gives back the type of its input."""

    plain: bool
    casts: bool


class LayerNorm(Kind):
    """`torch.nn.LayerNorm` over the last axis, by `ops.layer_norm`. A subclass may cast its input and result."""

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        return isinstance(module, nn.LayerNorm)

    @staticmethod
    def recognise(module: nn.Module) -> FoundNorm:
        assert isinstance(module, nn.LayerNorm)
        require_one_axis(module)
        if is_plain(module, nn.LayerNorm):
            return FoundNorm(plain=True, casts=False)
        require(not any(True for _ in module.children()), "it has parts, which LayerNorm has not")
        with trial.conditions(module):
            x = trial.random(2, 3, module.normalized_shape[0]) * 2 + 1
            other = "its class computes something else than LayerNorm on a trial input"
            require(trial.agree(_torch_norm(module, x), trial.outcome(type(module).forward, module, x)), other)
            plain, casts = (
                all(_is_as_expected(module, x.to(half), halved) for half in (torch.bfloat16, torch.float16))
                for halved in (True, False)
            )
        return FoundNorm(plain, casts)

    @staticmethod
    def least(size: gain.Size | None) -> int:
        return gain.least_of_norm()

    @staticmethod
    def pays(state: State, x: Tensor) -> bool:
        return gain.of_norm(x)

    @staticmethod
    def forward(module: Any, state: State, input: Tensor) -> Tensor:
        found, weight, kind = state.found, module.weight, input.dtype
        if torch.is_autocast_enabled(input.device.type):
            if not found.plain:
                raise Unserved("its class casts, and autocast is on")
            return layer_norm(input.float(), weight, module.bias, eps=module.eps)
        same = weight is None or weight.dtype is kind
        if same and (found.plain or input.element_size() >= 4):
            return layer_norm(input, weight, module.bias, eps=module.eps)
        if not found.casts or (weight is not None and weight.dtype is not torch.float32):
            raise Unserved(f"it was called with {kind} and has parameters of another type")
        return layer_norm(input.float(), weight, module.bias, eps=module.eps).to(kind)


def _torch_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _is_as_expected(norm: nn.LayerNorm, x: Tensor, halved: bool) -> bool:
    """Whether a norm does with x in half precision, and with parameters in that type or in float32, what `FoundNorm`
    says."""
    given = dict(norm._parameters)
    try:
        if halved:
            norm._parameters.update({k: None if p is None else p.to(x.dtype) for k, p in given.items()})  # type: ignore[arg-type]
        expected = _torch_norm(norm, x) if halved else _torch_norm(norm, x.float()).to(x.dtype)
        return torch.equal(type(norm).forward(norm, x), expected)
    except Exception:  # it does not take such an input, and so no call with one is served
        return False
    finally:
        norm._parameters.update(given)


class Linear(Kind):
    """`torch.nn.Linear`, by `ops.linear_act` where no gradient is wanted."""

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    @staticmethod
    def recognise(module: nn.Module) -> None:
        require(is_plain(module, nn.Linear), "its class replaces Linear's forward")
        require_linear(module, "")

    @staticmethod
    def weight(module: Any) -> Tensor:
        return module.weight

    @staticmethod
    def least(size: gain.Size) -> int:
        return gain.least_of_product(size)

    @staticmethod
    def pays(state: State, x: Tensor) -> bool:
        return gain.of_product(x, state.size)

    @staticmethod
    def forward(module: Any, state: State, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.linear(input, module.weight, module.bias)
        return product(input, module.weight, module.bias)


@dataclass(frozen=True)
class FoundMLP:
    """first, second: the names of its linear layers."""

    activation: Activation
    first: str
    second: str


class MLP(Kind):
    """Linear layer, QuickGELU or GELU, and linear layer, by `ops.mlp`; a `torch.nn.Sequential` or another class."""

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        names = _linear_names(module)
        if not names or module._parameters:
            return False
        others = (child for name, child in module._modules.items() if name not in names and child is not None)
        return not any(True for child in others for _ in child.parameters())

    @staticmethod
    def recognise(module: nn.Module) -> FoundMLP:
        first, second = _linear_names(module)
        for name in (first, second):
            require_linear(module, name)
        with trial.conditions(module):
            # 2.5 times a unit normal reaches where the forms of GELU differ most.
            x = trial.random(64, module.get_submodule(first).in_features) * 2.5  # type: ignore[arg-type, operator]
            expected = trial.outcome(type(module).forward, module, x)
            for activation in ACTIVATIONS:
                found = FoundMLP(activation, first, second)  # type: ignore[arg-type]
                if trial.agree(expected, _plain_mlp(module, found, x)):
                    return found
        raise Unsuitable(f"its activation is none of {', '.join(ACTIVATIONS)}")

    @staticmethod
    def weight(module: Any) -> Tensor:
        return module._modules[_linear_names(module)[0]].weight

    @staticmethod
    def least(size: gain.Size) -> int:
        return gain.least_of_product(size)

    @staticmethod
    def pays(state: State, x: Tensor) -> bool:
        return gain.of_product(x, state.size, fused=True)

    @staticmethod
    def forward(module: Any, state: State, *args: Any, **kwargs: Any) -> Tensor:
        given = (*args, *kwargs.values())
        if len(given) != 1:
            raise Unserved("it was called with arguments that are not known")
        if any(part.training and part.p > 0 for part in state.dropouts):
            raise Unserved("dropout is on")
        found = state.found
        return run_mlp(given[0], module._modules[found.first], module._modules[found.second], found.activation)


def _linear_names(module: nn.Module) -> tuple[str, ...]:
    return next((names for names in (("c_fc", "c_proj"), ("fc1", "fc2")) if has(module, *names)), ())


def _plain_mlp(module: nn.Module, found: FoundMLP, x: Tensor) -> Tensor:
    first, second = (module.get_submodule(name) for name in (found.first, found.second))
    return F.linear(ACTIVATIONS[found.activation](F.linear(x, first.weight, first.bias)), second.weight, second.bias)


def run_mlp(
    x: Tensor,
    fc: nn.Linear,
    proj: nn.Linear,
    activation: Activation,
    norm: nn.LayerNorm | None = None,
    add: bool = False,
) -> Tensor:
    """`ops.mlp` with the parameters of modules; `add` adds x."""
    for weight in (fc.weight, proj.weight):
        keep_packed(weight, x.numel() // x.shape[-1])
    return mlp(
        x,
        fc.weight,
        fc.bias,
        proj.weight,
        proj.bias,
        activation=activation,
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else norm.bias,
        eps=1e-5 if norm is None else norm.eps,
        residual=add,
    )


def require_attention(module: nn.MultiheadAttention) -> None:
    """Raises `Unsuitable` for a `torch.nn.MultiheadAttention` with options that the operators lack."""
    require(module.in_proj_weight is not None, "its keys or values have channels of their own (kdim, vdim)")
    require(module.bias_k is None and module.bias_v is None, "it adds a bias to keys and values (add_bias_kv)")
    require(not module.add_zero_attn, "it adds a zero to keys and values (add_zero_attn)")
    require_linear(module, "out_proj")


def attend(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, residual: Tensor | None = None, **masks: Any
) -> Tensor:
    """Attention of `query` to `key`, both `(batch, tokens, channels)`, with the module's parameters."""
    heads, width = module.num_heads, module.embed_dim
    weight, bias = module.in_proj_weight, module.in_proj_bias
    if key is query:
        q, k, v = product(query, weight, bias).unflatten(-1, (3, heads, -1)).unbind(-3)
    else:
        none = bias is None
        q = product(query, weight[:width], None if none else bias[:width]).unflatten(-1, (heads, -1))
        k, v = product(key, weight[width:], None if none else bias[width:]).unflatten(-1, (2, heads, -1)).unbind(-3)
    context = attention_with_dropout(q, k, v, module.dropout if module.training else 0.0, **masks)
    return product(context, module.out_proj.weight, module.out_proj.bias, residual=residual)


class MultiheadAttention(Kind):
    """`torch.nn.MultiheadAttention` without the matrix of scores, by `ops.attention`."""

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @staticmethod
    def recognise(module: nn.Module) -> None:
        assert isinstance(module, nn.MultiheadAttention)
        require(is_plain(module, nn.MultiheadAttention), "its class replaces MultiheadAttention's forward")
        require_attention(module)

    @staticmethod
    def weight(module: Any) -> Tensor:
        return module.in_proj_weight

    @staticmethod
    def least(size: gain.Size) -> int:
        return gain.least_of_product(size)

    @staticmethod
    def pays(state: State, x: Tensor) -> bool:
        return gain.of_product(x, state.size, fused=True)

    @staticmethod
    def forward(
        module: Any,
        state: State,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if need_weights:
            raise Unserved("it was asked for the weights of attention (need_weights)")
        if value is not key or query.dim() != 3:
            raise Unserved("it was called with values that are not the keys, or without a batch")
        if key_padding_mask is not None and key_padding_mask.dtype is not torch.bool:
            raise Unserved(f"it was called with a key_padding_mask of {key_padding_mask.dtype}")
        causal, tokens = attn_mask is not None, 1 if module.batch_first else 0
        if causal and not is_triangle(attn_mask, query.shape[tokens], key.shape[tokens]):
            raise Unserved("it was called with an attn_mask that is not the causal one")
        visible = None if key_padding_mask is None else ~key_padding_mask
        if visible is not None and not bool(visible[:, 0].all()):
            raise Unserved("the first token is padding")
        if module.batch_first:
            return attend(module, query, key, key_padding_mask=visible, causal=causal), None
        first = query.transpose(0, 1)
        out = attend(
            module, first, first if key is query else key.transpose(0, 1), key_padding_mask=visible, causal=causal
        )
        return laid_out_like(query, out), None


def is_triangle(mask: Tensor, queries: int, keys: int) -> bool:
    """Whether an attn_mask `(queries, keys)`, boolean or additive, hides exactly the keys after each query."""
    if tuple(mask.shape) != (queries, keys) or queries != keys:
        return False
    hidden = mask if mask.dtype is torch.bool else mask.isneginf()
    kept = mask if mask.dtype is torch.bool else mask.masked_fill(hidden, 0)
    later = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(1)
    return torch.equal(hidden, later) and (mask.dtype is torch.bool or not bool(kept.any()))


def laid_out_like(given: Tensor, out: Tensor) -> Tensor:
    """out `(batch, tokens, channels)` as `(tokens, batch, channels)`, in memory as `given` is: what came batch-first in
    disguise goes on so, and nothing is copied from one block to the next."""
    out = out.transpose(0, 1)
    return out if given.transpose(0, 1).is_contiguous() else out.contiguous()
