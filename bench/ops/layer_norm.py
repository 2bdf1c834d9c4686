"""Layer norm against a copy of its input."""

from bench.ops.baseline import Baseline, copy_of

BASELINES = (Baseline("copy", copy_of("x")),)
