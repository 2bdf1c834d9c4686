"""Modules that other codebases can import: `(batch, frames, tokens, channels)` or `(batch, tokens, channels)`."""

from mplug2_fast.nn.attention import CrossAttention, SelfAttention
from mplug2_fast.nn.layer_norm import LayerNorm
from mplug2_fast.nn.local_temporal import LocalTemporal
from mplug2_fast.nn.mlp import MLP

__all__ = ["MLP", "CrossAttention", "LayerNorm", "LocalTemporal", "SelfAttention"]
