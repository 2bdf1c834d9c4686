"""The books of beam search against PyTorch's gathers and sort, operation by operation."""

BASELINES = ()
