"""Residual addition and layer norm, with the sum, against copies of both inputs."""

from bench.ops.baseline import Baseline, at_least, copy_of

# 80% of the bandwidth of a copy; two tensors are read and two are written.
BASELINES = (Baseline("copy", copy_of("x", "update"), at_least(0.8)),)
