"""Attention against PyTorch's own."""

from bench.ops.baseline import Baseline, at_least, torch_backend
from mplug2_fast import ops

BASELINES = (Baseline("SDPA", torch_backend(ops.attention), at_least(1.3, 2.5)),)
