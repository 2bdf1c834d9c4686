"""Residual addition and layer norm, with the sum, against copies of both inputs."""

from bench.ops.baseline import Baseline, copy_of

# Two tensors are read and two are written.
BASELINES = (Baseline("copy", copy_of("x", "update")),)
