"""Layer norms, linear layers, multi-head attention and CLIP's MLP, as PyTorch has them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.acceleration import gain, int8, trial
from mplug2_fast.acceleration.products import keep_packed, normalised, product, two_products
from mplug2_fast.acceleration.structure import has, is_plain, require, require_linear, require_one_axis
from mplug2_fast.acceleration.swap import Kind, ProductKind, State, Unserved
from mplug2_fast.nn import mlp
from mplug2_fast.nn.attention import in_product
from mplug2_fast.ops import attention_with_dropout, layer_norm
from mplug2_fast.ops.linear_act import EAGER, Activation

ACTIVATIONS = {name: EAGER[name] for name in ("quick_gelu", "gelu")}


@dataclass(frozen=True)
class FoundNorm:
    """How a norm treats inputs in half precision.

    plain: like PyTorch's, if its parameters have the input's type.
    casts: computes in float32 with float32 parameters and returns the input's type.
    """

    plain: bool
    casts: bool


class LayerNormKind(Kind):
    """`torch.nn.LayerNorm` over the last axis. A subclass may cast its input and result."""

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        return isinstance(module, nn.LayerNorm)

    @staticmethod
    def recognise(module: nn.Module) -> FoundNorm:
        assert isinstance(module, nn.LayerNorm)
        require_one_axis(module)
        if is_plain(module, nn.LayerNorm):
            return FoundNorm(plain=True, casts=False)
        require(not any(True for _ in module.children()), "it has child modules, unlike LayerNorm")
        with trial.conditions(module):
            x = trial.random(2, 3, module.normalized_shape[0]) * 2 + 1
            agrees = trial.agree(_torch_norm(module, x), trial.outcome(type(module).forward, module, x))
            require(agrees, "its class computes something other than LayerNorm on a trial input")
            plain, casts = (
                all(_matches(module, x.to(half), halved) for half in (torch.bfloat16, torch.float16))
                for halved in (True, False)
            )
        return FoundNorm(plain, casts)

    @staticmethod
    def quick(original: type[nn.Module]) -> str:
        return "small_layer_norm" if original.forward is nn.LayerNorm.forward else "small_layer_norm_alike"

    @classmethod
    def too_small(cls, size: gain.Size | None) -> gain.TooSmall:
        return gain.small_for_norm()

    @classmethod
    def pays(cls, state: State, x: Tensor) -> bool:
        return gain.of_norm(x)

    @staticmethod
    def forward(module: Any, state: State, input: Tensor) -> Tensor:
        return int8.mark(LayerNormKind._compute(module, state, input), module)

    @staticmethod
    def _compute(module: Any, state: State, input: Tensor) -> Tensor:
        found, weight, dtype = state.found, module.weight, input.dtype
        if torch.is_autocast_enabled(input.device.type):
            if not found.plain:
                raise Unserved("its class casts, and autocast is on")
            return layer_norm(input.float(), weight, module.bias, eps=module.eps)
        same = weight is None or weight.dtype is dtype
        if same and (found.plain or input.element_size() >= 4):
            return layer_norm(input, weight, module.bias, eps=module.eps)
        if not found.casts or (weight is not None and weight.dtype is not torch.float32):
            raise Unserved(f"it was called with {dtype}, and its parameters have another type")
        return layer_norm(input.float(), weight, module.bias, eps=module.eps).to(dtype)


def _torch_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _matches(norm: nn.LayerNorm, x: Tensor, halved: bool) -> bool:
    """Whether a norm treats x in half precision as `FoundNorm` says: as `plain` with parameters in half precision, or
    as `casts` with parameters in float32."""
    given = dict(norm._parameters)
    try:
        if halved:
            norm._parameters.update({k: None if p is None else p.to(x.dtype) for k, p in given.items()})  # type: ignore[arg-type]
        expected = _torch_norm(norm, x) if halved else _torch_norm(norm, x.float()).to(x.dtype)
        return torch.equal(type(norm).forward(norm, x), expected)
    except Exception:  # it rejects such inputs, so there is no call to serve
        return False
    finally:
        norm._parameters.update(given)


class LinearKind(ProductKind):
    """`torch.nn.Linear`, without gradients."""

    is_fused = False

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
    def products(module: Any, found: Any) -> dict[str, tuple[nn.Module, Tensor]]:
        return {"": (module, module.weight)}

    @staticmethod
    def quick(original: type[nn.Module]) -> str:
        return "small_linear"

    @staticmethod
    def forward(module: Any, state: State, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not state.int8:
            return F.linear(input, module.weight, module.bias)
        return product(input, module)


@dataclass(frozen=True)
class FoundMLP:
    """first, second: the names of the linear layers."""

    activation: Activation
    first: str
    second: str


class MLPKind(ProductKind):
    """Linear layer, QuickGELU or GELU, linear layer; a `torch.nn.Sequential` or another class."""

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
        layers = [require_linear(module, name) for name in (first, second)]
        with trial.conditions(module):
            activation = trial.activation_of(functools.partial(type(module).forward, module), ACTIVATIONS, *layers)
        return FoundMLP(activation, first, second)

    @staticmethod
    def weight(module: Any) -> Tensor:
        return module._modules[_linear_names(module)[0]].weight

    @staticmethod
    def forward(module: Any, state: State, *args: Any, **kwargs: Any) -> Tensor:
        given = (*args, *kwargs.values())
        if len(given) != 1:
            raise Unserved("it was called with unknown arguments")
        state.require_no_dropout()
        found = state.found
        return run_mlp(given[0], module._modules[found.first], module._modules[found.second], found.activation)


def _linear_names(module: nn.Module) -> tuple[str, ...]:
    return next((names for names in (("c_fc", "c_proj"), ("fc1", "fc2")) if has(module, *names)), ())


def run_mlp(
    x: Tensor,
    fc: nn.Linear,
    proj: nn.Linear,
    activation: Activation,
    *,
    norm: nn.LayerNorm | None = None,
    residual: bool = False,
) -> Tensor:
    """`nn.mlp.compute` with 8-bit or packed weights."""
    rounded = two_products(x, fc, proj, norm or int8.norm_of(x))
    if rounded is not None:
        normed = None if norm is None else functools.partial(normalised, norm)
        return mlp.in_int8(x, fc.weight.shape[0], *rounded, activation, normed, residual)
    for layer in (fc, proj):
        keep_packed(layer.weight, x.numel() // x.shape[-1])
    return mlp.compute(x, fc, proj, activation, norm=norm, residual=residual)


def require_attention(module: nn.MultiheadAttention) -> None:
    """Raises `Unsuitable` for a `torch.nn.MultiheadAttention` with options that the operators lack."""
    require(module.in_proj_weight is not None, "its keys or values have other widths (kdim, vdim)")
    require(module.bias_k is None and module.bias_v is None, "it adds a bias to keys and values (add_bias_kv)")
    require(not module.add_zero_attn, "it adds a zero to keys and values (add_zero_attn)")
    require_linear(module, "out_proj")


def attend(module: Any, query: Tensor, key: Tensor, residual: Tensor | None = None, **masks: Any) -> Tensor:
    """Attention of `query` to `key`, both `(batch, tokens, channels)`, with the parameters of a
    `torch.nn.MultiheadAttention`, which has the names of `FusedProjections`."""
    width = module.embed_dim
    if key is query:
        heads = _project(module, query)
    else:
        heads = _project(module, query, slice(None, width)) + _project(module, key, slice(width, None))
    context = attention_with_dropout(*heads, module.dropout if module.training else 0.0, **masks)
    return product(context, module.out_proj, residual=residual)


def _project(module: Any, x: Tensor, rows: slice | None = None) -> tuple[Tensor, ...]:
    """Those of queries, keys and values of x `(batch, tokens, channels)` that rows of the weight compute, each `(batch,
    tokens, heads, head_dim)`."""
    rounded = int8.find(module, x, int8.norm_of(x), name="in_proj_", rows=rows)
    if rounded is None:
        weight = module.in_proj_weight if rows is None else module.in_proj_weight[rows]
        keep_packed(weight, x.numel() // module.embed_dim)
        out = in_product(module, x, rows)
    else:
        out = rounded(x)
    return out.unflatten(-1, (-1, module.num_heads, module.embed_dim // module.num_heads)).unbind(-3)


class MultiheadAttentionKind(ProductKind):
    """`torch.nn.MultiheadAttention` without the matrix of scores."""

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
    def products(module: Any, found: Any) -> dict[str, tuple[nn.Module, Tensor]]:
        return {"in_proj": (module, module.in_proj_weight), "out_proj": (module.out_proj, module.out_proj.weight)}

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
            raise Unserved("the caller wants the attention weights (need_weights)")
        if value is not key or query.dim() != 3:
            raise Unserved("it was called with values that are not the keys, or without a batch axis")
        if key_padding_mask is not None and key_padding_mask.dtype is not torch.bool:
            raise Unserved(f"it was called with a key_padding_mask of {key_padding_mask.dtype}")
        causal, tokens = attn_mask is not None, 1 if module.batch_first else 0
        if causal and not _is_causal(attn_mask, query.shape[tokens], key.shape[tokens]):
            raise Unserved("it was called with an attn_mask that is not the causal one")
        visible = None if key_padding_mask is None else ~key_padding_mask
        if visible is not None and not bool(visible[:, 0].all()):
            raise Unserved("the first token is padding")
        masks = {"key_padding_mask": visible, "causal": causal}
        if module.batch_first:
            return attend(module, query, key, **masks), None
        first = int8.mark_like(query.transpose(0, 1), query)
        out = attend(module, first, first if key is query else key.transpose(0, 1), **masks)
        return laid_out_like(query, out), None


def _is_causal(mask: Tensor, queries: int, keys: int) -> bool:
    """Whether an attn_mask `(queries, keys)`, boolean or additive, hides exactly the keys after each query."""
    if tuple(mask.shape) != (queries, keys) or queries != keys:
        return False
    hidden = mask if mask.dtype is torch.bool else mask.isneginf()
    later = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(1)
    return torch.equal(hidden, later) and not bool(mask.masked_fill(hidden, 0).any())


def laid_out_like(given: Tensor, out: Tensor) -> Tensor:
    """out `(batch, tokens, channels)` as `(tokens, batch, channels)`, with the memory layout of `given`. An input that
    is batch-first in memory stays so, and blocks pass it on without copies."""
    out = out.transpose(0, 1)
    return out if given.transpose(0, 1).is_contiguous() else out.contiguous()
