"""Layer norm against a copy of its input."""

from bench.ops.baseline import Baseline, at_least, copy_of

# 80% of the bandwidth of a copy.
BASELINES = (Baseline("copy", copy_of("x"), at_least(0.8)),)
