"""Functional operators: plain tensors in, plain tensors out."""

from mplug2_fast.ops.attention import attention, beam_attention
from mplug2_fast.ops.beam_step import beam_step
from mplug2_fast.ops.linear_act import linear_act
from mplug2_fast.ops.local_temporal import local_temporal
from mplug2_fast.ops.mlp import mlp
from mplug2_fast.ops.preprocess_frames import preprocess_frames

__all__ = [
    "attention",
    "beam_attention",
    "beam_step",
    "linear_act",
    "local_temporal",
    "mlp",
    "preprocess_frames",
]
