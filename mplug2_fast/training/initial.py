"""Initial weights of models that are trained from scratch."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def scale_preserving(model: Any) -> None:
    """Initialise matrices that preserve the scale of their inputs, for small models without pre-training.

    Biases are zero. Word embeddings have the standard deviation 0.02. That of positions is large enough to show beside
    patches, which have scale 1. Local temporal modules start as the identity.
    """
    for name, weight in model.official_parameters().items():
        if ".up_proj." in name or name.endswith("bias"):
            weight.zero_()
        elif name.endswith(("positional_embedding", "class_embedding")):
            weight.normal_(std=0.5)
        elif name.endswith(("embeddings.weight", "latents")):
            weight.normal_(std=0.02)
        elif weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5)
