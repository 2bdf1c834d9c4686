"""Which modules of a model get 8-bit weights when it is accelerated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mplug2_fast.acceleration import int8
from mplug2_fast.acceleration.basic import LayerNormKind
from mplug2_fast.acceleration.swap import STATE
from mplug2_fast.devices import INT8, eight_bit
from mplug2_fast.errors import ConfigError
from mplug2_fast.nn.quantise import matches
from mplug2_fast.ops.runtime import cpu


def plan(dtype: str | torch.dtype | None, keep: Sequence[str]) -> Rounding | None:
    """How weights are rounded, or None if they are not. Raises `ConfigError`, see `accelerate`."""
    if isinstance(keep, str):
        raise ConfigError(f"keep is a list of patterns: pass [{keep!r}]")
    if dtype is None:
        if keep:
            raise ConfigError("keep names layers that are not rounded to 8 bits: use it with the dtype int8")
        return None
    if eight_bit(dtype) != INT8:
        wanted = str(dtype).removeprefix("torch.")
        raise ConfigError(f"accelerate rounds weights to int8 only, got the dtype {wanted}: use model.to() for others")
    if not cpu.multiplies_bytes():
        raise ConfigError(
            "8-bit weights would be slower here, because this processor or the instruction set in use has no products "
            "of bytes (AVX-512 VNNI): leave out the dtype"
        )
    return Rounding(keep)


class Rounding:
    """Gives the linear layers of swapped modules 8-bit weights.

    Output embeddings stay wide: their scores decide between words, and a step reads them for few rows.

    Args:
        keep: patterns of further layers that stay wide.
    """

    def __init__(self, keep: Sequence[str]) -> None:
        self._keep = keep
        self._model = nn.Module()
        self._names: list[str] = []
        self._unfit: list[str] = []
        self._outputs: set[int] = set()
        self._changed: list[nn.Module] = []

    def start(self, model: nn.Module) -> None:
        """Raises `ConfigError` for a model of this package."""
        if callable(getattr(model, "quantise", None)):
            raise ConfigError(f"{type(model).__name__} rounds its own weights: call its method quantise instead")
        self._model = model
        self._outputs = {id(weight) for weight in _output_weights(model)}

    def round(self, module: Any, path: str, whole: str | None) -> str:
        """Gives the layers of a swapped module 8-bit weights. Returns a note for the report.

        Args:
            whole: the path of the swapped module that it is a part of, if any. Products are counted there.
        """
        state, kind = vars(module)[STATE], module._mplug2_fast_kind
        if kind is LayerNormKind:
            int8.feeds(module)
            self._changed.append(module)
            return ""
        calls = state.calls if whole is None else vars(self._model.get_submodule(whole))[STATE].calls
        reasons = []
        for part, (layer, weight) in kind.products(module, state.found).items():
            name = ".".join(each for each in (path, part) if each)
            reason = self._why_not(name, weight)
            if reason:
                reasons.append(reason)
            if not int8.is_rounded(layer):
                if not reason:
                    int8.add(layer, calls)
                    self._changed.append(layer)
            elif reason:
                raise ConfigError(f"{name} has an 8-bit weight already: call mplug2_fast.restore first")
        if not any(map(int8.is_rounded, module.modules())):
            return reasons[0] if reasons else ""
        if not state.int8:
            state.use_int8(kind)
            self._changed.append(module)
        return "8-bit weights"

    def _why_not(self, name: str, weight: torch.Tensor) -> str:
        if id(weight) in self._outputs:
            return "kept wide: it scores words"
        if reason := int8.unfit(weight):
            self._unfit.append(f"{name or 'the model'}: {reason}")
            return f"kept wide: {reason}"
        self._names.append(name)
        return "kept wide" if any(matches(pattern, name) for pattern in self._keep) else ""

    def finish(self) -> None:
        """Raises `ConfigError` for a pattern that matches nothing, and if no weight can be rounded."""
        if not self._names:
            why = f"; {self._unfit[0]}" if self._unfit else ""
            raise ConfigError(f"the model has no linear layer that can have 8-bit weights{why}")
        for pattern in self._keep:
            if not any(matches(pattern, name) for name in self._names):
                raise ConfigError(
                    f"keep {pattern!r} matches no layer: one of the {len(self._names)} layers is "
                    f"{self._names[len(self._names) // 2]}"
                )

    def undo(self) -> None:
        """Drops the 8-bit weights that this rounding has given."""
        for module in self._changed:
            int8.remove(module)
            if STATE in vars(module):
                vars(module)[STATE].use_int8(module._mplug2_fast_kind, used=False)


def _output_weights(model: nn.Module) -> Iterator[torch.Tensor]:
    """The weights that score words: those that are also embeddings, and those that a model names."""
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    for part in model.modules():
        named = getattr(part, "get_output_embeddings", None)
        found = named() if callable(named) else None
        for layer in (part, found):
            weight = layer._parameters.get("weight") if isinstance(layer, nn.Module) else None
            if weight is not None and (layer is found or id(weight) in embeddings):
                yield weight
