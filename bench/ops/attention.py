"""Attention against PyTorch's own, scaled_dot_product_attention, which is what PyTorch's backend is."""

BASELINES = ()
