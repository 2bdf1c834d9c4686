"""Reads, checks, converts and describes official checkpoints. The models do not depend on this package."""

from mplug2_fast.checkpoint.convert import convert, save_pretrained
from mplug2_fast.checkpoint.fit import Fit
from mplug2_fast.checkpoint.inspect import Inspection, KeyGroup, inspect
from mplug2_fast.checkpoint.load import load_official, official_state_dict
from mplug2_fast.checkpoint.pretrained import from_pretrained
from mplug2_fast.checkpoint.source import vocabulary_path
from mplug2_fast.models import InferredConfig, infer_config, official_names
from mplug2_fast.models.names import KeyKind

load_released = load_official
"""Former name of `load_official`."""
released_state_dict = official_state_dict
"""Former name of `official_state_dict`."""

__all__ = [
    "Fit",
    "InferredConfig",
    "Inspection",
    "KeyGroup",
    "KeyKind",
    "convert",
    "from_pretrained",
    "infer_config",
    "inspect",
    "load_official",
    "load_released",
    "official_names",
    "official_state_dict",
    "released_state_dict",
    "save_pretrained",
    "vocabulary_path",
]
