"""The text decoder and its language-model head."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.acceleration import trial
from mplug2_fast.acceleration.basic import ACTIVATIONS
from mplug2_fast.acceleration.cache import Call, Record, Values
from mplug2_fast.acceleration.products import product
from mplug2_fast.acceleration.structure import has, require, require_children, require_linear, require_norm
from mplug2_fast.acceleration.swap import DecoderPartKind, Kind, State, Unserved, Unsuitable, original_forward
from mplug2_fast.ops import layer_norm, linear_act
from mplug2_fast.ops.checksum import reading_weights
from mplug2_fast.ops.linear_act import Activation

_MAX_LOGITS_BYTES = 256 << 20
"""Larger logits are not kept."""

_CACHES = ("cache", "past_key_values", "past_key_value")
"""Arguments for keys and values that the caller keeps. With one of them, the session keeps nothing."""


class TextDecoderKind(Kind):
    """A decoder whose layers and head keep their results while each call continues the one before.

    The decoder's own code runs unchanged.
    """

    runs_original = True

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        if not has(module, "bert", "cls") or not has(module.bert, "encoder", "embeddings"):  # type: ignore[arg-type]
            return False
        return has(module.bert.encoder, "layer") and has(module.cls, "predictions")  # type: ignore[arg-type, union-attr]

    @staticmethod
    def recognise(module: nn.Module) -> None:
        layers = module.bert.encoder.layer.children()  # type: ignore[union-attr]
        require(all(has(layer, "crossattention") for layer in layers), "some of its layers have no cross-attention")

    @staticmethod
    def forward(module: Any, state: State, *args: Any, **kwargs: Any) -> Any:
        assert state.session is not None
        if module.training or torch.is_grad_enabled():
            reason = "no gain with gradients or in training mode"
        elif any(kwargs.get(name) is not None for name in _CACHES):
            reason = "the caller keeps keys and values"
        else:
            state.calls.served += 1
            with state.session.call():
                return original_forward(module, *args, **kwargs)
        state.calls.left(reason, by_parts=True)
        state.session.drop()
        return original_forward(module, *args, **kwargs)


@dataclass(frozen=True)
class FoundHead:
    """embeddings: whether the output embeddings are an argument of its forward, or else its part `decoder`."""

    activation: Activation
    embeddings: bool


class PredictionHeadKind(DecoderPartKind):
    """Dense, activation, layer norm, output embeddings."""

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        return has(module, "transform") and has(module.transform, "dense", "LayerNorm")  # type: ignore[arg-type]

    @staticmethod
    def recognise(module: nn.Module) -> FoundHead:
        require_children(module, {"transform", "decoder"})
        require_linear(module, "transform.dense")
        require_norm(module, "transform.LayerNorm")
        given = len(inspect.signature(module.forward).parameters) == 2
        require(given or has(module, "decoder"), "it has no output embeddings")
        if not given:
            require_linear(module, "decoder")
        require(isinstance(getattr(module, "bias", None), Tensor), "it has no bias")
        width = module.transform.dense.in_features  # type: ignore[union-attr]
        with trial.conditions(module):
            x = trial.random(3, 5, width) * 2
            rest = (trial.random(module.bias.shape[0], width, seed=1),) if given else ()  # type: ignore[union-attr]
            expected = trial.outcome(type(module).forward, module, x, *rest)
            for activation in ACTIVATIONS:
                found = FoundHead(activation, given)  # type: ignore[arg-type]
                if trial.agree(expected, _logits(module, found, x, *rest)):
                    return found
        raise Unsuitable("on a trial input it computes something other than BERT's head")

    @staticmethod
    def weight(module: Any) -> Tensor:
        return module.transform.dense.weight

    @staticmethod
    def forward(module: Any, state: State, x: Tensor, *embeddings: Tensor) -> Tensor:
        found = state.found
        if len(embeddings) != found.embeddings:
            raise Unserved("it was called with unknown arguments")
        call = Call.current(state.session)
        if call is None or x.dim() != 3 or call.videos is None:
            return _logits(module, found, x, *embeddings)
        return _continue(module, found, call, x, *embeddings)


def _logits(module: Any, found: FoundHead, x: Tensor, *embeddings: Tensor) -> Tensor:
    transform = module.transform
    h = product(x, transform.dense, found.activation)
    h = layer_norm(h, transform.LayerNorm.weight, transform.LayerNorm.bias, eps=transform.LayerNorm.eps)
    weight, bias = (embeddings[0], module.bias) if embeddings else (module.decoder.weight, module.decoder.bias)
    return linear_act(h, weight, bias)  # not packed: the embeddings are large and the rows few


def _continue(head: Any, found: FoundHead, call: Call, x: Tensor, *embeddings: Tensor) -> Tensor:
    """The logits of all tokens of x `(rows, tokens, channels)`. Computes only those of new tokens if the rows continue
    rows of the last call."""
    record = call.videos.records.get(id(head))
    parameters, weights = (*head.parameters(), *embeddings), None
    parents = None if record is None else call.parents(record, x, None, None)
    if record is not None and parents is not None:
        with reading_weights() as read:
            new = _logits(head, found, x[:, record.x.shape[1] :], *embeddings)
        weights, out = Values(parameters, read), torch.cat([record.out[parents], new], dim=1)
    if weights is None or not weights.same(record.weights):
        weights, out = Values(parameters), _logits(head, found, x, *embeddings)
    if call.is_generation(x) and out.numel() * out.element_size() <= _MAX_LOGITS_BYTES:
        call.videos.records[id(head)] = Record(weights, x.clone(), out.clone())
    else:
        call.videos.records.pop(id(head), None)
    return out
