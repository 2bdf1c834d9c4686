"""Modules for other codebases, on `(batch, frames, tokens, channels)` or `(batch, tokens, channels)`."""

from mplug2_fast.nn.attention import CrossAttention, SelfAttention
from mplug2_fast.nn.bert_layer import BertLayer as FusionLayer
from mplug2_fast.nn.layer_norm import LayerNorm
from mplug2_fast.nn.local_temporal import LocalTemporal
from mplug2_fast.nn.mlp import MLP
from mplug2_fast.nn.temporal_block import TemporalBlock

__all__ = ["MLP", "CrossAttention", "FusionLayer", "LayerNorm", "LocalTemporal", "SelfAttention", "TemporalBlock"]
