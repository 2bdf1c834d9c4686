"""BERT's attention, post-norm, with BERT's parameter names.

Implementations differ in the arguments and results of these modules. The arguments are known by their names, the form
of the result by trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.acceleration import int8, trial
from mplug2_fast.acceleration.masks import Known, Mask, form, understand
from mplug2_fast.acceleration.products import product
from mplug2_fast.acceleration.structure import (
    Signature,
    dropout_of,
    has,
    require,
    require_children,
    require_dropout,
    require_linear,
    require_norm,
)
from mplug2_fast.acceleration.swap import ProductKind, State, Unserved, Unsuitable
from mplug2_fast.ops import add_layer_norm, attention_with_dropout, layer_norm


class Projections:
    """The steps of an attention module with the parts `self` and `output`, as functions of tensors."""

    def __init__(self, attention: Any) -> None:
        self.inner, self.output = attention.self, attention.output
        self.heads = _heads(self.inner)

    def _project(self, linear: nn.Linear, x: Tensor) -> Tensor:
        return product(x, linear).unflatten(-1, (self.heads, -1))

    def query(self, x: Tensor) -> Tensor:
        """`(batch, tokens, channels)` to `(batch, tokens, heads, head_dim)`."""
        return self._project(self.inner.query, x)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._project(self.inner.key, x), self._project(self.inner.value, x)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        if mask.other is not None:
            added = mask.other if mask.other.dtype is torch.bool else mask.other.to(query.dtype)
            query, key, value = (t.transpose(1, 2) for t in (query, key, value))
            out = F.scaled_dot_product_attention(query, key, value, added, dropout_of(self.inner))
            return out.transpose(1, 2).flatten(2)
        return attention_with_dropout(
            query, key, value, dropout_of(self.inner), key_padding_mask=mask.visible, causal=mask.causal
        )

    @property
    def dropout(self) -> float:
        """The larger of its current dropout probabilities."""
        return max(dropout_of(self.inner), dropout_of(self.output))

    def finish(self, context: Tensor, residual: Tensor) -> Tensor:
        """Output projection, residual, layer norm."""
        return add_norm(self.output, residual, product, context, self.output.dense)


def add_norm(output: Any, residual: Tensor, sublayer: Any, *args: Any) -> Tensor:
    """layer_norm(residual + dropout(sublayer(*args))). Without dropout, the sublayer adds the residual."""
    norm, dropout = output.LayerNorm, dropout_of(output)
    if dropout > 0:
        update = F.dropout(sublayer(*args), dropout)
        return add_layer_norm(residual.to(update.dtype), update, norm.weight, norm.bias, eps=norm.eps)
    return int8.mark(layer_norm(sublayer(*args, residual=residual), norm.weight, norm.bias, eps=norm.eps), norm)


def _heads(inner: nn.Module) -> int:
    return int(getattr(inner, "num_attention_heads", getattr(inner, "num_heads", 0)))


def require_bert_attention(module: nn.Module, name: str) -> None:
    """Raises `Unsuitable` unless the parts of an attention module are BERT's."""
    attention = module.get_submodule(name)
    prefix = f"{name}." if name else ""
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        require_linear(module, prefix + part)
    require_norm(module, f"{prefix}output.LayerNorm")
    inner, output = attention.self, attention.output
    kind = getattr(inner, "position_embedding_type", None) or "absolute"
    require(kind == "absolute", f"{prefix}self has relative position embeddings ({kind})")
    require_children(inner, {"query", "key", "value", "dropout"})  # type: ignore[arg-type]
    require_children(output, {"dense", "LayerNorm", "dropout"})  # type: ignore[arg-type]
    for part in (inner, output):
        require_dropout(part)  # type: ignore[arg-type]
    heads = _heads(inner)  # type: ignore[arg-type]
    require(heads > 0, f"{prefix}self has no number of heads")
    require(
        inner.query.weight.shape[0] % heads == 0,
        f"{prefix}self has a number of heads that does not divide its channels",
    )


def require_unsaved(attention: Any) -> None:
    if getattr(attention.self, "save_attention", False):
        raise Unserved("it saves its attention weights (save_attention)")


# --- results


def result_forms(out: Tensor, key: Tensor, value: Tensor) -> dict[str, Any]:
    """The forms of results in known implementations. Keys and values are `(batch, heads, tokens, head_dim)`."""
    return {
        "tensor": out,
        "(tensor,)": (out,),
        "(tensor, None)": (out, None),
        "(tensor, keys, values)": (out, key, value),
        "(tensor, (keys, values))": (out, (key, value)),
    }


def form_of(expected: Any, result: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """The form of `expected` that agrees with the result, or None."""
    return next((name for name, form in result_forms(*result).items() if trial.agree(expected, form)), None)


MASKS = ("an additive mask", "no mask", "a boolean mask")
"""Forms of masks to try, see `masks.form`."""

Readings = dict[str, bool]
"""Form of a mask -> whether it also makes attention causal. Forms that a module reads in another way are left out."""


def trial_mask(form: str, batch: int, keys: int, queries: int) -> Tensor | None:
    """A mask of this form that hides the last key of the last row."""
    if form == "no mask":
        return None
    mask = trial.padding(batch, keys)
    return mask if form == "an additive mask" else (mask == 0).expand(-1, -1, queries, -1)


def read(mask: Tensor | None, x: Tensor, memory: Tensor, readings: Readings, known: Known | None = None) -> Mask:
    """`understand`, for a module with these readings."""
    if form(mask) not in readings:
        raise Unserved(f"it was called with {form(mask)}, and it reads such masks in an unknown way")
    found = understand(mask, x, memory, known)
    return found._replace(causal=True) if readings[form(mask)] else found


@dataclass(frozen=True)
class FoundAttention:
    """readings: how it reads masks, without (False) and with a memory (True)."""

    signature: Signature
    form: str
    readings: dict[bool, Readings] = field(hash=False)


class BertAttentionKind(ProductKind):
    """Self- or cross-attention with its output layer."""

    is_fused = False

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        if not has(module, "self", "output"):
            return False
        return has(module.self, "query", "key", "value") and has(module.output, "dense", "LayerNorm")

    @staticmethod
    def recognise(module: Any) -> FoundAttention:
        require_children(module, {"self", "output"})
        require_bert_attention(module, "")
        signature = Signature.of(module.forward)
        width, other = module.self.query.in_features, module.self.key.in_features
        readings: dict[bool, Readings] = {False: {}, True: {}}
        forms = set()
        with trial.conditions(module):
            x, memory = trial.random(2, 3, width), trial.random(2, 5, other, seed=1)
            for given in MASKS:
                calls = []
                if "memory" in signature.roles:
                    role = "memory_mask" if "memory_mask" in signature.roles else "mask"
                    calls.append((True, {"x": x, "memory": memory, role: trial_mask(given, 2, 5, 3)}))
                if width == other:
                    own = {"memory": x} if "memory" in signature.roles and "memory_mask" not in signature.roles else {}
                    calls.append((False, {"x": x, "mask": trial_mask(given, 2, 3, 3), **own}))
                for with_memory, call in calls:
                    try:
                        expected = trial.outcome(type(module).forward, module, **signature.arguments(**call))
                    except Unsuitable:
                        if given == MASKS[0]:
                            raise
                        continue
                    found = _reading(module, call, given, expected)
                    if found is not None:
                        readings[with_memory][given], result = found
                        forms.add(result)
                    elif given == MASKS[0]:
                        forms.add("")
        agrees = "" not in forms and len(forms) == 1
        require(agrees, "on a trial input it computes something other than BERT's attention")
        return FoundAttention(signature, forms.pop(), readings)

    @staticmethod
    def weight(module: Any) -> Tensor:
        return module.self.query.weight

    @staticmethod
    def refusal(state: State, kwargs: Mapping[str, Any]) -> str:
        return state.found.signature.refusal(kwargs)

    @staticmethod
    def forward(module: Any, state: State, *args: Any, **kwargs: Any) -> Any:
        require_unsaved(module)
        found = state.found
        bound = found.signature.bind(args, kwargs)
        out, key, value = _attention(module, bound, found.readings[_has_memory(bound)])
        return result_forms(out, key, value)[found.form]


def _has_memory(bound: dict[str, Any]) -> bool:
    return bound.get("memory") is not None and bound["memory"] is not bound["x"]


def _reading(module: Any, call: dict[str, Any], given: str, expected: Any) -> tuple[bool, str] | None:
    """(Whether attention is causal, the form of the result) in a call with such a mask, or None if nothing agrees."""
    for causal in (False, True) if not _has_memory(call) else (False,):
        result = form_of(expected, _attention(module, call, {given: causal}))
        if result is not None:
            return causal, result
    return None


def _attention(module: Any, bound: dict[str, Any], readings: Readings) -> tuple[Tensor, Tensor, Tensor]:
    x, memory = bound["x"], bound.get("memory")
    mask = bound["memory_mask"] if memory is not None and "memory_mask" in bound else bound.get("mask")
    memory = x if memory is None else memory
    seen = read(mask, x, memory, readings)
    projections = Projections(module)
    key, value = projections.key_value(memory)
    out = projections.finish(projections.attend(projections.query(x), key, value, seen), x)
    return out.to(x.dtype), key.transpose(1, 2), value.transpose(1, 2)
