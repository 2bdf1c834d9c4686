"""Layer norm and the linear layer after it, with its activation, against the product alone."""

from bench.ops.baseline import Baseline
from bench.ops.linear_act import product

BASELINES = (Baseline("GEMM", product),)
