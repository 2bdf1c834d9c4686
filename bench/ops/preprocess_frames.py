"""Frames to pixels against PyTorch's indexing and arithmetic."""

BASELINES = ()
