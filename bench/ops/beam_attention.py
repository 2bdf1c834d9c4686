"""Attention of the beams against reading the memory: half of copying it."""

from bench.ops.baseline import Baseline, copy_of

BASELINES = (Baseline("copy of the memory", copy_of("key", "value")),)
