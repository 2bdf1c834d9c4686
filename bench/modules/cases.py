"""The level `modules`: what there is to measure, and each of it."""

from __future__ import annotations

from bench.case import Case
from bench.modules import decoder_step, fusion_layer, temporal_block, universal_layers
from bench.row import Key
from bench.selection import Selection

MODULES = {
    "TemporalBlock": temporal_block,
    "universal layers": universal_layers,
    "fusion layer": fusion_layer,
    "decoder step": decoder_step,
}
NAMES = tuple(MODULES)


def keys(selection: Selection) -> list[Key]:
    """By module, direction and dtype."""
    found = [
        Key("modules", name, selection.preset, direction, dtype, selection.device)
        for name, module in MODULES.items()
        for direction in selection.directions
        if direction in module.DIRECTIONS
        for dtype in selection.dtypes
    ]
    return [key for key in found if selection.wants(key)]


def build(key: Key, *, compile: bool) -> Case:
    """Ours, and beside it "reference", "eager" and, where `compile` says so, "compiled"."""
    return MODULES[key.name].build(key, compile=compile)
