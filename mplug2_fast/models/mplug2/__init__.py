"""A fast mPLUG-2 (arXiv 2302.00402). It computes the function of `mplug2_fast.reference` by another algorithm."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mplug2_fast.models.mplug2.aliases import MPlug2ForCaptioning, MPlug2ForQuestionAnswering
    from mplug2_fast.models.mplug2.config import MPlug2Config
    from mplug2_fast.models.mplug2.model import Fused, MPlug2
    from mplug2_fast.outputs import GenerationOutput

# Imported when first used: reading a configuration does not import the operators.
_EXPORTS = {
    "Fused": "mplug2_fast.models.mplug2.model",
    "GenerationOutput": "mplug2_fast.outputs",
    "MPlug2": "mplug2_fast.models.mplug2.model",
    "MPlug2Config": "mplug2_fast.models.mplug2.config",
    "MPlug2ForCaptioning": "mplug2_fast.models.mplug2.aliases",
    "MPlug2ForQuestionAnswering": "mplug2_fast.models.mplug2.aliases",
}

__all__ = ["Fused", "GenerationOutput", "MPlug2", "MPlug2Config", "MPlug2ForCaptioning", "MPlug2ForQuestionAnswering"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
