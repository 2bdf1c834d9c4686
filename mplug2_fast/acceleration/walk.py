"""`accelerate`, and how to undo it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mplug2_fast import nn as fast_nn
from mplug2_fast.acceleration.basic import LayerNormKind, LinearKind, MLPKind, MultiheadAttentionKind
from mplug2_fast.acceleration.bert_attention import BertAttentionKind
from mplug2_fast.acceleration.bert_layer import BertLayerKind
from mplug2_fast.acceleration.cache import Session
from mplug2_fast.acceleration.local_temporal import LocalTemporalKind
from mplug2_fast.acceleration.report import Entry, Report
from mplug2_fast.acceleration.rounding import Rounding, plan
from mplug2_fast.acceleration.swap import (
    HOOKED,
    STATE,
    Kind,
    Last,
    Swapped,
    Unsuitable,
    hooked,
    inner,
    name_of,
    require_plain_weights,
    swap,
    unswap,
    wrapper_of,
)
from mplug2_fast.acceleration.temporal_block import TemporalBlockKind
from mplug2_fast.acceleration.text_decoder import PredictionHeadKind, TextDecoderKind

KINDS: tuple[type[Kind], ...] = (
    TextDecoderKind,
    PredictionHeadKind,
    TemporalBlockKind,
    LocalTemporalKind,
    BertLayerKind,
    BertAttentionKind,
    MultiheadAttentionKind,
    MLPKind,
    LayerNormKind,
    LinearKind,
)
"""All kinds; modules come before their parts."""

_FAST = tuple(getattr(fast_nn, name) for name in fast_nn.__all__)


def accelerate(model: nn.Module, dtype: str | torch.dtype | None = None, keep: Sequence[str] = ()) -> Report:
    """Makes all known modules of this model compute with `mplug2_fast.ops`, in place.

    A module is recognised by its structure and by what it computes on a small trial input with random parameters,
    wherever its class comes from: the official mPLUG-2, `mplug2_fast.reference`, or any model with such parts. Side
    effects of a forward, such as printing, are not noticed. Instances keep their parameters, children and hooks, and
    remain instances of their classes. Classes and other instances do not change.

    A call that a module cannot serve runs the original code with accelerated parts; a `RuntimeWarning` says so once.
    Without a warning, the original code runs calls that are too small to win, calls with gradients on a CPU, and calls
    under torch's compilers, transforms and modes.

    A text decoder that is called step by step with whole prefixes and a tiled memory, as in the official beam search,
    keeps keys and values between calls in evaluation mode without gradients: see `mplug2_fast.acceleration.cache`. On
    a CPU, weights of large products are kept a second time, in the layout of the processor's matrix products. Both
    compare weights by value, so weights may change in any way.

    Args:
        dtype: "int8" rounds the weights of linear layers to 8 bits, for products with many rows on a CPU. The wide
            weights stay, compute small products and gradients, and are rounded again when they change. None: no
            rounding.
        keep: with int8, patterns of layers that are not rounded, such as "encoder.layer.0". Names are those of
            `model.named_modules()`.

    Returns a report of what happened to each module; from then on it also counts calls. A model that is accelerated
    already does not change, but int8 rounds it.

    Raises:
        ConfigError: another dtype, `keep` without int8 or with a pattern that matches no layer, a processor without
            products of bytes, or a model without weights that can be rounded.
    """
    walk = _Walk(plan(dtype, keep))
    walk.go(model)
    return Report(tuple(walk.entries))


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`. Parameters keep their current values."""
    for module in model.modules():
        if isinstance(module, Swapped):
            unswap(module)


@contextmanager
def accelerated(model: nn.Module, dtype: str | torch.dtype | None = None, keep: Sequence[str] = ()) -> Iterator[Report]:
    """`accelerate` inside a context. Modules that were accelerated before stay so."""
    walk = _Walk(plan(dtype, keep))
    walk.go(model)
    try:
        yield Report(tuple(walk.entries))
    finally:
        walk.undo()


class _Walk:
    """One pass over a model."""

    def __init__(self, rounding: Rounding | None) -> None:
        self.entries: list[Entry] = []
        self._rounding = rounding
        self._swapped: list[nn.Module] = []
        self._paths: dict[int, str] = {}
        self._known: dict[Any, Any] = {}
        self._last = Last()

    def go(self, model: nn.Module) -> None:
        try:
            if self._rounding is not None:
                self._rounding.start(model)
            self._visit(model, "", None)
            if self._rounding is not None:
                self._rounding.finish()
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        for module in self._swapped:
            if isinstance(module, Swapped):
                unswap(module)
        if self._rounding is not None:
            self._rounding.undo()

    def _visit(self, module: nn.Module, path: str, session: Session | None, part_of: str | None = None) -> None:
        if id(module) in self._paths:
            reason = f"it is the same module as {self._paths[id(module)]}"
            self.entries.append(Entry(path, type(module).__name__, None, reason, part_of))
            return
        self._paths[id(module)] = path or "the model"
        if isinstance(module, Swapped):
            state, place = vars(module)[STATE], len(self.entries)
            self._visit_children(module, path, state.session, self._whole(module, path, part_of))
            self._report(module, path, self._note(module, path, part_of, "already"), part_of, place)
            return
        if isinstance(module, (*_FAST, torch.jit.ScriptModule)):
            scripted = isinstance(module, torch.jit.ScriptModule)
            self._report(module, path, "it is compiled by TorchScript" if scripted else "it is a fast module", part_of)
            return
        kind = next((kind for kind in KINDS if kind.looks_like(module)), None)
        if kind is None:
            children = list(module.children())
            if not children and any(True for _ in module.parameters()):
                self._report(module, path, "nothing faster is known for it", part_of)
            self._visit_children(module, path, session, part_of)
            return
        try:
            self._swap(module, path, kind, session, part_of)
        except Unsuitable as reason:
            self._report(module, path, str(reason), part_of)
            self._visit_children(module, path, session, part_of)

    def _visit_children(self, module: nn.Module, path: str, session: Session | None, part_of: str | None) -> None:
        if isinstance(module, nn.MultiheadAttention):  # it does not call its out_proj
            return
        for name, child in module._modules.items():
            if child is not None:
                self._visit(child, f"{path}.{name}" if path else name, session, part_of)

    @staticmethod
    def _whole(module: Any, path: str, part_of: str | None) -> str | None:
        """The path of the module that the modules inside this swapped one are parts of."""
        return part_of if module._mplug2_fast_kind.runs_original or part_of is not None else path

    def _swap(
        self, module: nn.Module, path: str, kind: type[Kind], session: Session | None, part_of: str | None
    ) -> None:
        if "forward" in vars(module) and wrapper_of(module) is None:
            raise Unsuitable("its forward is replaced on the instance in an unknown way")
        parts = () if kind.runs_original else inner(module)
        for part in hooked(parts):
            raise Unsuitable(HOOKED.format(name_of(part, module)))
        if any(isinstance(part, Swapped) for part in parts):
            raise Unsuitable("parts of it are accelerated already; call restore first")
        if not kind.runs_original:
            require_plain_weights(module)
        found = self._recognise(module, kind)
        session = Session() if kind is TextDecoderKind else session
        swap(module, kind, found, session, self._last)
        self._swapped.append(module)
        place = len(self.entries)
        self._visit_children(module, path, session, self._whole(module, path, part_of))
        note = ""
        if kind is TextDecoderKind:
            layers = [m for m in module.modules() if isinstance(m, Swapped) and m._mplug2_fast_kind is BertLayerKind]
            if not layers:
                self._swapped.remove(module)
                unswap(module)
                self._report(module, path, "none of its layers is known", part_of, place)
                return
            note = "keeps keys and values between calls"
        vars(module)[STATE].record((module, *parts), inside=part_of is not None)
        self._report(module, path, self._note(module, path, part_of, note), part_of, place)

    def _note(self, module: nn.Module, path: str, part_of: str | None, note: str) -> str:
        """Gives a swapped module its 8-bit weights, and adds to the note about it."""
        more = "" if self._rounding is None else self._rounding.round(module, path, part_of)
        return "; ".join(each for each in (note, more) if each)

    def _recognise(self, module: nn.Module, kind: type[Kind]) -> Any:
        """`kind.recognise`, once for modules that are built alike."""
        key = (kind, _make(module))
        if key not in self._known:
            try:
                self._known[key] = kind.recognise(module)
            except Unsuitable as reason:
                self._known[key] = reason
            except Exception as error:  # a structure that recognition did not expect
                self._known[key] = Unsuitable(f"recognition failed: {type(error).__name__}: {error}")
        found = self._known[key]
        if isinstance(found, Unsuitable):
            raise found
        return found

    def _report(self, module: Any, path: str, reason: str, part_of: str | None, place: int | None = None) -> None:
        """Adds an entry, by default at the end."""
        replacement, calls = None, None
        if isinstance(module, Swapped):
            replacement, calls = module._mplug2_fast_kind.replacement(), vars(module)[STATE].calls
        entry = Entry(path, type(module).__name__, replacement, reason, part_of, calls)
        self.entries.insert(len(self.entries) if place is None else place, entry)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (int, float, str, bool, type(None), list, tuple, set, dict)


def _make(module: nn.Module) -> tuple[Any, ...]:
    """A key that is equal for modules that compute the same, apart from the values of their parameters."""
    made = []
    for name, part in module.named_modules():
        own = [(k, v) for k, v in vars(part).items() if k not in _OF_EVERY_MODULE]
        attributes = tuple((k, repr(v) if isinstance(v, _PLAIN) else id(v)) for k, v in own)
        tensors = tuple((k, tuple(p.shape)) for k, p in part._parameters.items() if p is not None)
        made.append((name, type(part), attributes, tensors))
    return tuple(made)
