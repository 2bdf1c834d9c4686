"""BERT layers: self-attention, cross-attention where there is a memory, feed-forward part.

What a layer does with a memory, in the mode for a video's tokens, or at its place in the fusion encoder, differs from
one to the next, and trials tell it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.acceleration import trial
from mplug2_fast.acceleration.attention import (
    BertAttention,
    Projections,
    add_norm,
    form_of,
    require_bert_attention,
    require_unsaved,
    result_forms,
)
from mplug2_fast.acceleration.basic import ACTIVATIONS, run_mlp
from mplug2_fast.acceleration.cache import Call
from mplug2_fast.acceleration.masks import Mask, understand
from mplug2_fast.acceleration.steps import decode
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
from mplug2_fast.acceleration.swap import Kind, State, Unserved, Unsuitable
from mplug2_fast.ops.linear_act import Activation


@dataclass(frozen=True)
class FoundLayer:
    """signature: of its forward. form: in which it returns. uses: kind of call -> what the layer does then."""

    activation: Activation
    signature: Signature
    form: str
    uses: dict[str, str] = field(hash=False)


class BertLayer(Kind):
    """Self-attention, cross-attention where there is a memory, feed-forward part; in a decoder with cached keys."""

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        if not has(module, "attention", "intermediate", "output"):
            return False
        return BertAttention.looks_like(module.attention) and has(module.intermediate, "dense")  # type: ignore[arg-type]

    @staticmethod
    def recognise(module: nn.Module) -> FoundLayer:
        require_children(
            module, {"attention", "crossattention", "intermediate", "output", "intermediate_vision", "output_vision"}
        )
        for name in ("attention", "crossattention"):
            if has(module, name):
                require_children(module.get_submodule(name), {"self", "output"})
                require_bert_attention(module, name)
        for name in ("intermediate.dense", "output.dense"):
            require_linear(module, name)
        require_norm(module, "output.LayerNorm")
        require_dropout(module.output)  # type: ignore[arg-type]
        signature = Signature.of(module.forward)
        with trial.conditions(module):
            activation = _activation(module)
            uses, form = _try_out(module, signature, activation)
        return FoundLayer(activation, signature, form, uses)

    @staticmethod
    def forward(module: Any, state: State, *args: Any, **kwargs: Any) -> Any:
        found = state.found
        bound = found.signature.bind(args, kwargs)
        kind = _kind_of_call(module, bound)
        if kind not in found.uses:
            raise Unserved(f"it was called in a way that was not tried: {kind}")
        for name in ("attention", "crossattention"):
            if has(module, name):
                require_unsaved(module.get_submodule(name))
        out, key, value = _layer(module, bound, found.uses[kind], found.activation, Call.current(state.session))
        return result_forms(out.to(bound["x"].dtype), key, value)[found.form]


def _activation(module: Any) -> Activation:
    """The activation of the feed-forward part, which may be a module, an attribute or a line of code."""
    intermediate = module.intermediate
    # 2.5 times a unit normal reaches where the forms of GELU differ most.
    x = trial.random(64, intermediate.dense.in_features) * 2.5
    expected = trial.outcome(intermediate, x)
    hidden = F.linear(x, intermediate.dense.weight, intermediate.dense.bias)
    for name, function in ACTIVATIONS.items():
        if trial.agree(expected, function(hidden)):
            return name  # type: ignore[return-value]
    raise Unsuitable(f"the activation of intermediate is none of {', '.join(ACTIVATIONS)}")


def _kind_of_call(module: nn.Module, bound: dict[str, Any]) -> str:
    """What may decide what a layer does."""
    memory = "a memory" if bound.get("memory") is not None else "no memory"
    place = ""
    if bound.get("place") is not None:
        place = f", a place {'of' if _is_connected(module, bound['place']) else 'without'} connected attention"
    mode = f", mode {bound['mode']}" if "mode" in bound else ""
    return memory + mode + place


def _is_connected(module: nn.Module, place: Any) -> bool:
    """Whether a layer at this place among those that run is one of connected attention."""
    stride = getattr(module, "stride_layer", None)
    return stride is not None and int(place) != 0 and int(place) % stride == 0


def _try_out(module: Any, signature: Signature, activation: Activation) -> tuple[dict[str, str], str]:
    """What the layer does in each kind of call that it accepts, and the form in which it returns."""
    width = module.attention.self.query.in_features
    x = trial.random(2, 5, width)
    calls: list[dict[str, Any]] = [{"x": x, "mask": trial.padding(2, 5)}]
    if "memory" in signature.roles:
        other = module.crossattention.self.key.in_features if has(module, "crossattention") else width
        given = {"memory": trial.random(2, 7, other, seed=1), "memory_mask": trial.padding(2, 7)}
        calls.append({**calls[0], **given})
    if "mode" in signature.roles:
        calls += [{**call, "mode": mode} for call in calls for mode in ("norm", "v_module")]
    if "place" in signature.roles:
        places = [0, 1, *([stride] if (stride := getattr(module, "stride_layer", None)) else [])]
        calls = [{**call, "place": place} for call in calls for place in places]
    found: dict[str, set[tuple[str, str] | None]] = {}
    refusals = []
    for call in calls:
        try:
            expected = trial.outcome(type(module).forward, module, **signature.arguments(**call))
        except Unsuitable as why:  # such as a decoder's layer without a memory
            refusals.append(why)
            continue
        forms = ((use, form_of(expected, _layer(module, call, use, activation, None))) for use in _uses(module, call))
        match = next(((use, form) for use, form in forms if form is not None), None)
        found.setdefault(_kind_of_call(module, call), set()).add(match)
    if not found:
        raise refusals[0]
    # What a layer does in one kind of call must be one thing, and known; calls of other kinds are left to it.
    known = {kind: matches.pop() for kind, matches in found.items() if len(matches) == 1}
    uses = {kind: match[0] for kind, match in known.items() if match is not None}
    forms = {match[1] for match in known.values() if match is not None}
    require(bool(uses), "on a trial input it computes something else than a BERT layer")
    require(len(forms) == 1, f"it returns now {', now '.join(sorted(forms))}")
    return uses, forms.pop()


def _uses(module: Any, call: dict[str, Any]) -> list[str]:
    if "memory" not in call or not has(module, "crossattention"):
        return ["self-attention"]
    if "place" in call:
        return ["cross-attention", "connected attention"]
    if call.get("mode", "norm") == "norm":
        return ["cross-attention", "self-attention"]
    latents = getattr(module, "latents", None)
    return [*(["latents"] if isinstance(latents, Tensor) else []), "roles swapped", "cross-attention", "self-attention"]


def _layer(
    module: Any, bound: dict[str, Any], use: str, activation: Activation, call: Call | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(result, keys, values) of the layer; keys and values are those of self-attention."""
    x, memory, mask, memory_mask = (bound.get(role) for role in ("x", "memory", "mask", "memory_mask"))
    if use == "latents":
        x, mask = module.latents.expand(x.shape[0], -1, -1), None
    elif use == "roles swapped":
        x, memory, mask, memory_mask = memory, x, None, None
    elif use == "self-attention":
        memory = None
    elif use == "connected attention":
        x, memory, mask = torch.cat([memory, x], dim=1), None, _joined(memory_mask, mask)
    known = None if call is None else call.masks
    seen = understand(mask, x, x, known)
    memory_seen = Mask() if memory is None else understand(memory_mask, x, memory, known)

    def feed_forward(x: Tensor) -> Tensor:
        return add_norm(module.output, x, _mlp, x, module, activation)

    own = Projections(module.attention)
    if memory is None:
        x, key, value = attend_self(own, x, seen)
        return feed_forward(x), key.transpose(1, 2), value.transpose(1, 2)
    cross = Projections(module.crossattention)
    dropout = max(own.dropout, cross.dropout, dropout_of(module.output))
    if call is not None and (seen.causal or x.shape[1] == 1) and x.numel() > 0 and dropout == 0:
        step = decode(call, module, own, cross, feed_forward, x, seen.visible, memory, memory_seen.visible)
        if step is not None:
            return step
    x, key, value = attend_self(own, x, seen)
    query = cross.query(x[:1]).expand(x.shape[0], -1, -1, -1) if is_constant(x) else cross.query(x)
    x = cross.finish(cross.attend(query, *cross.key_value(memory), memory_seen), x)
    return feed_forward(x), key.transpose(1, 2), value.transpose(1, 2)


def _joined(memory_mask: Tensor | None, mask: Tensor | None) -> Tensor | None:
    if memory_mask is None or mask is None:
        raise Unserved("it was called without masks for both what it reads")
    return torch.cat([memory_mask, mask], dim=3)


def _mlp(x: Tensor, module: Any, activation: Activation, residual: Tensor | None = None) -> Tensor:
    return run_mlp(x, module.intermediate.dense, module.output.dense, activation, add=residual is not None)


def attend_self(attention: Projections, x: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor]:
    """(result, keys, values). Rows that are all one row, as latents are before they meet a video, are computed once."""
    rows = x.shape[0]
    once = is_constant(x) and mask.visible is None and attention.dropout == 0
    x = x[:1] if once else x
    key, value = attention.key_value(x)
    out = attention.finish(attention.attend(attention.query(x), key, value, mask), x)
    if once:
        out, key, value = (t.expand(rows, *t.shape[1:]) for t in (out, key, value))
    return out, key, value


def is_constant(x: Tensor) -> bool:
    """Whether all rows of x are the same memory."""
    return x.shape[0] > 1 and x.stride(0) == 0
