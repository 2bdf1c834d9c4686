"""Self-attention of a decoding step against PyTorch's indexing and scaled_dot_product_attention."""

BASELINES = ()
