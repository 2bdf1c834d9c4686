"""The level `modules`: modules of the model in the forms that are compared."""

from __future__ import annotations

from bench.case import Case
from bench.modules import decoder_step, forms, fusion_layer, operator_call, temporal_block, universal_layers
from bench.row import DIRECTIONS, Key, Selection

WORKS = {
    "TemporalBlock": temporal_block.WORK,
    "universal layers": universal_layers.WORK,
    "fusion layer": fusion_layer.WORK,
}
FORWARD_ONLY = {"decoder step": decoder_step.build, "operator call": operator_call.build}
MODULES = (*WORKS, "decoder step")
NAMES = (*MODULES, "operator call")


def keys(selection: Selection) -> list[Key]:
    """By module, direction and dtype. "operator call" is no module and runs on the CPU only: it times the interpreter,
    and a GPU computes meanwhile."""
    found = [
        Key("modules", name, selection.preset, direction, dtype, selection.device)
        for name in (NAMES if selection.device == "cpu" else MODULES)
        for direction in selection.directions
        if direction in (DIRECTIONS if name in WORKS else ("forward",))
        for dtype in selection.dtypes
    ]
    return [key for key in found if selection.wants(key)]


def build(key: Key, *, compile: bool) -> Case:
    """Ours; beside a module "reference", "eager" and, with `compile`, "compiled"."""
    if key.name in WORKS:
        return forms.build(WORKS[key.name], key, compile=compile)
    return FORWARD_ONLY[key.name](key, compile=compile)
