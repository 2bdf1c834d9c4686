"""The level `modules`: what there is to measure, and each of it."""

from __future__ import annotations

from bench.case import Case
from bench.modules import decoder_step, fusion_layer, operator_call, temporal_block, universal_layers
from bench.row import Key
from bench.selection import Selection

MODULES = {
    "TemporalBlock": temporal_block,
    "universal layers": universal_layers,
    "fusion layer": fusion_layer,
    "decoder step": decoder_step,
}
ON_A_CPU = {"operator call": operator_call}
"""No module of the model; what a GPU does meanwhile would say nothing about it."""
NAMES = (*MODULES, *ON_A_CPU)


def keys(selection: Selection) -> list[Key]:
    """By module, direction and dtype."""
    offered = MODULES | ON_A_CPU if selection.device == "cpu" else MODULES
    found = [
        Key("modules", name, selection.preset, direction, dtype, selection.device)
        for name, module in offered.items()
        for direction in selection.directions
        if direction in module.DIRECTIONS
        for dtype in selection.dtypes
    ]
    return [key for key in found if selection.wants(key)]


def build(key: Key, *, compile: bool) -> Case:
    """Ours, and beside it, of modules, "reference", "eager" and, where `compile` says so, "compiled"."""
    return (MODULES | ON_A_CPU)[key.name].build(key, compile=compile)
