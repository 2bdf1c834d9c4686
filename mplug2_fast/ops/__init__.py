"""Functional operators: plain tensors in, plain tensors out, each with several backends.

`explain` shows which backend runs and why the others were skipped. `use_backend` forces one, `strict` forbids
fallbacks.
"""

from mplug2_fast.ops.add_layer_norm import add_layer_norm
from mplug2_fast.ops.attention import attention, attention_with_dropout
from mplug2_fast.ops.beam_attention import beam_attention
from mplug2_fast.ops.beam_attention_int8 import beam_attention_int8
from mplug2_fast.ops.beam_step import beam_step
from mplug2_fast.ops.beam_update import beam_update
from mplug2_fast.ops.decoder_layer import decoder_layer
from mplug2_fast.ops.layer_norm import layer_norm
from mplug2_fast.ops.linear_act import linear_act
from mplug2_fast.ops.linear_fp8 import linear_fp8
from mplug2_fast.ops.linear_int8 import linear_int8
from mplug2_fast.ops.local_temporal import local_temporal
from mplug2_fast.ops.mlp import mlp
from mplug2_fast.ops.norm_linear_act import norm_linear_act
from mplug2_fast.ops.preprocess_frames import preprocess_frames
from mplug2_fast.ops.quantise_memory import quantise_memory
from mplug2_fast.ops.runtime.backend import strict, use_backend
from mplug2_fast.ops.runtime.choice import Explanation
from mplug2_fast.ops.runtime.onednn import pack as pack_weight
from mplug2_fast.ops.runtime.onednn import unpack as unpack_weight
from mplug2_fast.ops.runtime.op import Op, explain
from mplug2_fast.ops.step_attention import step_attention

OPERATORS = {name: value for name, value in sorted(globals().items()) if isinstance(getattr(value, "op", None), Op)}
"""Every operator by name; `OPERATORS[name].op.spec` is its specification."""

__all__ = [
    "OPERATORS",
    "Explanation",
    "add_layer_norm",
    "attention",
    "attention_with_dropout",
    "beam_attention",
    "beam_attention_int8",
    "beam_step",
    "beam_update",
    "decoder_layer",
    "explain",
    "layer_norm",
    "linear_act",
    "linear_fp8",
    "linear_int8",
    "local_temporal",
    "mlp",
    "norm_linear_act",
    "pack_weight",
    "preprocess_frames",
    "quantise_memory",
    "step_attention",
    "strict",
    "unpack_weight",
    "use_backend",
]
