"""BERT layers: self-attention, cross-attention if there is a memory, feed-forward network.

Trials find out what a layer does with a memory, in the mode for a video's tokens and at each place in the fusion
encoder, because implementations differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.acceleration import trial
from mplug2_fast.acceleration.basic import ACTIVATIONS, run_mlp
from mplug2_fast.acceleration.bert_attention import (
    MASKS,
    BertAttentionKind,
    Projections,
    Readings,
    add_norm,
    form_of,
    read,
    require_bert_attention,
    require_unsaved,
    result_forms,
    trial_mask,
)
from mplug2_fast.acceleration.cache import Call
from mplug2_fast.acceleration.cached_layer import CausalLayer
from mplug2_fast.acceleration.masks import Mask, understand
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
from mplug2_fast.acceleration.swap import DecoderPartKind, State, Unserved, Unsuitable
from mplug2_fast.ops.linear_act import Activation

MODES = {"norm": ("v_module",), None: ("text", "multimodal")}
"""Default mode -> the other modes of an implementation."""


@dataclass(frozen=True)
class FoundLayer:
    """How a layer computes.

    Attributes:
        signature: of its forward.
        form: of its result, see `result_forms`.
        uses: kind of call -> what the layer does in it.
        own: how it reads the mask of its input. other: how it reads the mask of the memory.
    """

    activation: Activation
    signature: Signature
    form: str
    uses: dict[str, str] = field(hash=False)
    own: Readings = field(hash=False)
    other: Readings = field(hash=False)


class BertLayerKind(DecoderPartKind):
    """Self-attention, cross-attention if there is a memory, feed-forward network; in a decoder with cached keys."""

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        if not has(module, "attention", "intermediate", "output"):
            return False
        return BertAttentionKind.looks_like(module.attention) and has(module.intermediate, "dense")  # type: ignore[arg-type]

    @staticmethod
    def recognise(module: nn.Module) -> FoundLayer:
        require_children(
            module, {"attention", "crossattention", "intermediate", "output", "intermediate_vision", "output_vision"}
        )
        for name in ("attention", "crossattention"):
            if has(module, name):
                require_children(module.get_submodule(name), {"self", "output"})
                require_bert_attention(module, name)
        dense, _ = (require_linear(module, name) for name in ("intermediate.dense", "output.dense"))
        require_norm(module, "output.LayerNorm")
        require_dropout(module.output)  # type: ignore[arg-type]
        signature = Signature.of(module.forward)
        with trial.conditions(module):
            activation = trial.activation_of(module.intermediate, ACTIVATIONS, dense)  # type: ignore[arg-type]
            return _try_out(module, signature, activation)

    @staticmethod
    def weight(module: Any) -> Tensor:
        return module.intermediate.dense.weight

    @staticmethod
    def refusal(state: State, kwargs: Mapping[str, Any]) -> str:
        return state.found.signature.refusal(kwargs)

    @staticmethod
    def forward(module: Any, state: State, *args: Any, **kwargs: Any) -> Any:
        found = state.found
        bound = found.signature.bind(args, kwargs)
        kind = _kind_of_call(module, bound)
        if kind not in found.uses:
            raise Unserved(f"it was called in an unknown way: {kind}")
        for name in ("attention", "crossattention"):
            if has(module, name):
                require_unsaved(module.get_submodule(name))
        out, key, value = _layer(module, bound, found.uses[kind], found, Call.current(state.session))
        return result_forms(out.to(bound["x"].dtype), key, value)[found.form]


def _kind_of_call(module: nn.Module, bound: dict[str, Any]) -> str:
    """Everything about a call that may decide what a layer does."""
    memory = "a memory" if bound.get("memory") is not None else "no memory"
    place = ""
    if bound.get("place") is not None:
        place = f", a place {'of' if _is_connected(module, bound['place']) else 'without'} connected attention"
    mode = f", mode {bound['mode']}" if "mode" in bound else ""
    return memory + mode + place


def _is_connected(module: nn.Module, place: Any) -> bool:
    """Whether the layer at this place among those that run has connected attention."""
    stride = getattr(module, "stride_layer", None)
    return stride is not None and int(place) != 0 and int(place) % stride == 0


def _try_out(module: Any, signature: Signature, activation: Activation) -> FoundLayer:
    """Finds out what the layer does in each kind of call that it accepts, and the form of its results."""
    found: dict[str, set[tuple[str, str] | None]] = {}
    own: dict[str, set[bool | None]] = {}
    other: dict[str, set[bool | None]] = {}
    refusals = []
    for call, masks in _calls(module, signature):
        try:
            expected = trial.outcome(type(module).forward, module, **signature.arguments(**call))
        except Unsuitable as why:  # such as a decoder's layer without a memory
            refusals.append(why)
            continue
        match = _match(module, call, masks, activation, expected)
        if masks == (MASKS[0], MASKS[0]):
            found.setdefault(_kind_of_call(module, call), set()).add(None if match is None else match[0])
        if match is not None or masks[0] != MASKS[0]:
            own.setdefault(masks[0], set()).add(None if match is None else match[1])
        if match is not None or masks[1] != MASKS[0]:
            other.setdefault(masks[1], set()).add(None if match is None else False)
    if not found:
        raise refusals[0]
    # Serve a kind of call only if the layer does one known thing in all calls of that kind.
    known = {kind: matches.pop() for kind, matches in found.items() if len(matches) == 1}
    uses = {kind: match[0] for kind, match in known.items() if match is not None}
    forms = {match[1] for match in known.values() if match is not None}
    require(bool(uses), "on a trial input it computes something other than a BERT layer")
    require(len(forms) == 1, f"its results have several forms: {', '.join(sorted(forms))}")
    return FoundLayer(activation, signature, forms.pop(), uses, _readings(own), _readings(other))


def _readings(found: dict[str, set[bool | None]]) -> Readings:
    """The forms of masks that are read in one known way."""
    return {form: causal for form, (causal, *more) in found.items() if causal is not None and not more}


def _calls(module: Any, signature: Signature) -> Iterator[tuple[dict[str, Any], tuple[str, str]]]:
    """Calls by role, with the forms of their masks: all kinds with additive masks, the first also with other masks."""
    width = module.attention.self.query.in_features
    other = module.crossattention.self.key.in_features if has(module, "crossattention") else width
    x, memory = trial.random(2, 5, width), trial.random(2, 7, other, seed=1)

    def call(own: str, others: str | None, **options: Any) -> tuple[dict[str, Any], tuple[str, str]]:
        given = {"x": x, "mask": trial_mask(own, 2, 5, 5), **options}
        if others is not None:
            given |= {"memory": memory, "memory_mask": trial_mask(others, 2, 7, 5)}
        return given, (own, others or MASKS[0])

    additive = MASKS[0]
    memories = [None, additive] if "memory" in signature.roles else [None]
    places: list[Any] = [None]
    if "place" in signature.roles:
        places = [0, 1, *([stride] if (stride := getattr(module, "stride_layer", None)) else [])]
    for place in places:
        options = {} if place is None else {"place": place}
        modes = (None, *MODES.get(signature.default_mode, ())) if "mode" in signature.roles else (None,)
        for mode in modes:
            for others in memories:
                yield call(additive, others, **options, **({} if mode is None else {"mode": mode}))
    options = {} if places[0] is None else {"place": places[0]}
    for given in MASKS[1:]:
        yield call(given, None, **options)
        if len(memories) > 1:
            yield call(given, additive, **options)
            yield call(additive, given, **options)


def _match(
    module: Any, call: dict[str, Any], masks: tuple[str, str], activation: Activation, expected: Any
) -> tuple[tuple[str, str], bool] | None:
    """((what the layer did, the form of the result), whether it was causal), or None if nothing agrees."""
    for causal in (False, True):
        for use in _uses(module, call):
            tried = FoundLayer(activation, None, "", {}, {masks[0]: causal}, {masks[1]: False})  # type: ignore[arg-type]
            try:
                form = form_of(expected, _layer(module, call, use, tried, None))
            except Unserved:  # such as a mask that this use reads in another way
                continue
            if form is not None:
                return (use, form), causal
    return None


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
    module: Any, bound: dict[str, Any], use: str, found: FoundLayer, call: Call | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(result, keys, values); keys and values are those of self-attention."""
    x, memory, mask, memory_mask = (bound.get(role) for role in ("x", "memory", "mask", "memory_mask"))
    if use == "latents":
        x = module.latents.expand(x.shape[0], -1, -1)
    elif use == "roles swapped":
        x, memory = memory, x
    elif use == "self-attention":
        memory = None
    elif use == "connected attention":
        x, memory, mask = torch.cat([memory, x], dim=1), None, _joined(memory_mask, mask)
    known = None if call is None else call.masks
    if use in ("latents", "roles swapped"):
        seen = Mask()
    elif use == "connected attention":
        seen = understand(mask, x, x, known)
    else:
        seen = read(mask, x, x, found.own, known)
    memory_seen = Mask()
    if memory is not None and use != "roles swapped":
        memory_seen = read(memory_mask, x, memory, found.other, known)

    def feed_forward(x: Tensor) -> Tensor:
        return add_norm(module.output, x, _mlp, x, module, found.activation)

    own = Projections(module.attention)
    if memory is None:
        x, key, value = attend_self(own, x, seen)
        return feed_forward(x), key.transpose(1, 2), value.transpose(1, 2)
    cross = Projections(module.crossattention)
    dropout = max(own.dropout, cross.dropout, dropout_of(module.output))
    whole = seen.other is None and memory_seen.other is None
    if call is not None and whole and (seen.causal or x.shape[1] == 1) and x.numel() > 0 and dropout == 0:
        layer = CausalLayer(call, module, own, cross, feed_forward)
        step = layer.decode(x, seen.visible, memory, memory_seen.visible)
        if step is not None:
            return step
    x, key, value = attend_self(own, x, seen)
    query = cross.query(x[:1]).expand(x.shape[0], -1, -1, -1) if is_constant(x) else cross.query(x)
    x = cross.finish(cross.attend(query, *cross.key_value(memory), memory_seen), x)
    return feed_forward(x), key.transpose(1, 2), value.transpose(1, 2)


def _joined(memory_mask: Tensor | None, mask: Tensor | None) -> Tensor | None:
    if memory_mask is None or mask is None or not (memory_mask.is_floating_point() and mask.is_floating_point()):
        raise Unserved("connected attention was called without two additive masks")
    return torch.cat([memory_mask, mask], dim=3)


def _mlp(x: Tensor, module: Any, activation: Activation, residual: Tensor | None = None) -> Tensor:
    return run_mlp(x, module.intermediate.dense, module.output.dense, activation, residual=residual is not None)


def attend_self(attention: Projections, x: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor]:
    """(result, keys, values). Computes equal rows once, such as the latents before they attend to a video."""
    rows = x.shape[0]
    once = is_constant(x) and mask.visible is None and mask.other is None and attention.dropout == 0
    x = x[:1] if once else x
    key, value = attention.key_value(x)
    out = attention.finish(attention.attend(attention.query(x), key, value, mask), x)
    if once:
        out, key, value = (t.expand(rows, *t.shape[1:]) for t in (out, key, value))
    return out, key, value


def is_constant(x: Tensor) -> bool:
    """Whether all rows of x share memory."""
    return x.shape[0] > 1 and x.stride(0) == 0
