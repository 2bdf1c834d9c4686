"""Released checkpoints: read, checked, converted, described. The models know nothing of this."""

from mplug2_fast.checkpoint.convert import convert, save_pretrained
from mplug2_fast.checkpoint.fit import Fit
from mplug2_fast.checkpoint.infer import InferredConfig, infer_config
from mplug2_fast.checkpoint.inspect import Inspection, KeyGroup, inspect
from mplug2_fast.checkpoint.keys import KeyKind, KeyMap, needed_keys
from mplug2_fast.checkpoint.load import load_released, released_state_dict
from mplug2_fast.checkpoint.pretrained import from_pretrained
from mplug2_fast.checkpoint.source import vocabulary_path

__all__ = [
    "Fit",
    "InferredConfig",
    "Inspection",
    "KeyGroup",
    "KeyKind",
    "KeyMap",
    "convert",
    "from_pretrained",
    "infer_config",
    "inspect",
    "load_released",
    "needed_keys",
    "released_state_dict",
    "save_pretrained",
    "vocabulary_path",
]
