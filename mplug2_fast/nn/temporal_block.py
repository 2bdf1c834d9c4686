"""mPLUG-2's vision block."""

from __future__ import annotations

from torch import Tensor, nn

from mplug2_fast.nn.attention import SelfAttention
from mplug2_fast.nn.layer_norm import LayerNorm
from mplug2_fast.nn.local_temporal import LocalTemporal
from mplug2_fast.nn.mlp import MLP
from mplug2_fast.nn.unchanged import Kinds, unchanged

_ADDING: Kinds = frozenset((SelfAttention, MLP))
"""Modules that can add the residual themselves."""


class TemporalBlock(nn.Module):
    """Local temporal module, attention within each frame, local temporal module, MLP; pre-norm.

    Replaces the official `ResidualAttentionBlock`, or CLIP's if temporal is False, with the same state dict. New
    temporal modules are the identity.

    Args:
        d_model: channels.
        n_head: heads; must divide d_model.
        mlp_ratio: the MLP has mlp_ratio * d_model inner channels.
        reduction: the temporal modules have d_model // reduction inner channels.
        kernel_size: frames that a temporal module sees, odd.
        eps: of all layer norms.
        attention_dropout: on the attention weights, in training.
        temporal: False leaves out the temporal modules.

    Source: mPLUG-2 (arXiv 2302.00402), section 3.2.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        *,
        mlp_ratio: int = 4,
        reduction: int = 2,
        kernel_size: int = 3,
        eps: float = 1e-5,
        attention_dropout: float = 0.0,
        temporal: bool = True,
    ) -> None:
        super().__init__()
        self.lmhra1 = LocalTemporal(d_model, reduction, kernel_size, eps) if temporal else None
        self.lmhra2 = LocalTemporal(d_model, reduction, kernel_size, eps) if temporal else None
        self.attn = SelfAttention(d_model, n_head, attention_dropout)
        self.ln_1 = LayerNorm(d_model, eps=eps)
        self.mlp = MLP(d_model, mlp_ratio * d_model, "quick_gelu")
        self.ln_2 = LayerNorm(d_model, eps=eps)

    def forward(self, x: Tensor, *, temporal: bool = True) -> Tensor:
        """x and result: `(..., frames, 1 + patches, d_model)`, with any leading axes.

        `temporal=False` skips the temporal modules.
        """
        x = self.lmhra1(x) if temporal and self.lmhra1 is not None else x
        fuses = unchanged(_ADDING, self.attn)
        x = self.attn(x, norm=self.ln_1, residual=x) if fuses else x + self.attn(self.ln_1(x))
        x = self.lmhra2(x) if temporal and self.lmhra2 is not None else x
        if unchanged(_ADDING, self.mlp):
            return self.mlp(x, norm=self.ln_2, residual=True)
        return x + self.mlp(self.ln_2(x))
