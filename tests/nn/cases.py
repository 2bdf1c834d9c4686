"""Every module with its twin in plain PyTorch, which has the same parameters and the same call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.models.mplug2.config import TextConfig, VisionConfig
from mplug2_fast.nn import (
    MLP,
    CrossAttention,
    FusionLayer,
    LayerNorm,
    SelfAttention,
    TemporalBlock,
)
from mplug2_fast.reference.bert import BertLayer, cross_attention_mask, self_attention_mask
from mplug2_fast.reference.vision import QuickGELU, ResidualAttentionBlock

Inputs = dict[str, Any]
DIM, HEADS, HIDDEN = 32, 4, 48
VISION = VisionConfig(width=DIM, head_dim=DIM // HEADS, mlp_ratio=2)


def text_config(hidden_dropout_prob: float = 0.0, attention_probs_dropout_prob: float = 0.0) -> TextConfig:
    return TextConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        hidden_dropout_prob=hidden_dropout_prob,
        attention_probs_dropout_prob=attention_probs_dropout_prob,
    )


def flat(x: Tensor | None, axes: int) -> Tensor | None:
    """x with all axes before its last `axes` axes made one."""
    return None if x is None else x[None].flatten(0, x.dim() - axes)


class TorchAttention(nn.MultiheadAttention):
    """Self-attention without a memory, else cross-attention."""

    def __init__(self, **options: Any) -> None:
        super().__init__(DIM, HEADS, batch_first=True, **options)

    def forward(self, x, memory=None, *, key_padding_mask=None, causal=False, residual=None):  # type: ignore[override]
        memory = x if memory is None else memory
        queries, keys = x.shape[-2], memory.shape[-2]
        out, _ = super().forward(
            flat(x, 2),
            flat(memory, 2),
            flat(memory, 2),
            key_padding_mask=None if key_padding_mask is None else flat(key_padding_mask, 1) == 0,
            attn_mask=torch.ones(queries, keys, dtype=torch.bool).triu(1) if causal else None,
            need_weights=False,
        )
        out = out.reshape(x.shape)
        return out if residual is None else residual + out


class TorchNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class TorchMLP(nn.Sequential):
    def __init__(self, act: nn.Module) -> None:
        super().__init__(OrderedDict(c_fc=nn.Linear(DIM, HIDDEN), act=act, c_proj=nn.Linear(HIDDEN, DIM)))

    def forward(self, x: Tensor, *, residual: bool = False) -> Tensor:
        return x + super().forward(x) if residual else super().forward(x)


class TorchBlock(ResidualAttentionBlock):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        frames, tokens, width = x.shape[-3:]
        out = super().forward(x.reshape(-1, tokens, width).transpose(0, 1), frames)
        return out.transpose(0, 1).reshape(x.shape)


class TorchPlainBlock(TorchBlock):
    """CLIP's block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        del self.lmhra1, self.lmhra2

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x).flatten(0, -3).transpose(0, 1)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0].transpose(0, 1).reshape(x.shape)
        return x + self.mlp(self.ln_2(x))


class TorchBert(BertLayer):
    def forward(self, x, *, key_padding_mask=None, causal=False, memory=None, memory_mask=None):  # type: ignore[override]
        flat_x, mask = flat(x, 2), flat(key_padding_mask, 1)
        if causal and mask is None:
            mask = torch.ones(flat_x.shape[:2], dtype=torch.long)
        mask = None if mask is None else self_attention_mask(mask, x.dtype, causal=causal)
        memory_mask = None if memory_mask is None else cross_attention_mask(flat(memory_mask, 1), x.dtype)
        return super().forward(flat_x, mask, flat(memory, 2), memory_mask).reshape(x.shape)


def randomise(module: nn.Module) -> nn.Module:
    """Randomises all parameters: zeros and ones would hide errors."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return module


def by_official_name(module: nn.Module, get: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Tensor]:
    """Official name -> a view of the parameter, or of its gradient."""
    return {name: get(parameter) for name, parameter in module.named_parameters()}


def gradient(parameter: Tensor) -> Tensor:
    return parameter.grad


def padding(*shape: int) -> Tensor:
    """A mask `(..., tokens)` that hides some tokens, but never the first."""
    mask = torch.rand(shape) > 0.3
    mask[..., :1] = True
    return mask.long()


def frames_of(*lead: int) -> Inputs:
    return {"x": torch.randn(*lead, 3, 1 + 4, DIM)}


def tokens_of(*lead: int) -> Inputs:
    return {"x": torch.randn(*lead, 7, DIM)}


def memory_of(*lead: int) -> Inputs:
    return {"memory": torch.randn(*lead, 9, DIM)}


@dataclass(frozen=True)
class Case:
    """Functions that make the module, its twin, and the arguments of both for any leading axes."""

    make: Callable[[], nn.Module]
    twin: Callable[[], nn.Module]
    inputs: Callable[..., Inputs]

    def pair(self, seed: int = 0) -> tuple[nn.Module, nn.Module]:
        """(ours, twin) with the same random parameters, in training mode."""
        torch.manual_seed(seed)
        ours, twin = randomise(self.make()), self.twin()
        twin.load_state_dict({name: view.clone() for name, view in by_official_name(ours).items()})
        return ours, twin


def _fusion(cross_attention: bool) -> dict[str, Callable[[], nn.Module]]:
    return {
        "make": lambda: FusionLayer.from_config(text_config(), cross_attention=cross_attention),
        "twin": lambda: TorchBert(text_config(), cross_attention=cross_attention),
    }


CASES = {
    "SelfAttention": Case(lambda: SelfAttention(DIM, HEADS), TorchAttention, tokens_of),
    "SelfAttention, masked, residual, no bias": Case(
        lambda: SelfAttention(DIM, HEADS, bias=False),
        lambda: TorchAttention(bias=False),
        lambda *lead: {
            **tokens_of(*lead),
            "key_padding_mask": padding(*lead, 7),
            "residual": torch.randn(*lead, 7, DIM),
        },
    ),
    "SelfAttention, causal": Case(
        lambda: SelfAttention(DIM, HEADS), TorchAttention, lambda *lead: {**tokens_of(*lead), "causal": True}
    ),
    "CrossAttention": Case(
        lambda: CrossAttention(DIM, HEADS), TorchAttention, lambda *lead: {**tokens_of(*lead), **memory_of(*lead)}
    ),
    "CrossAttention, masked, residual, no bias": Case(
        lambda: CrossAttention(DIM, HEADS, bias=False),
        lambda: TorchAttention(bias=False),
        lambda *lead: {
            **tokens_of(*lead),
            **memory_of(*lead),
            "key_padding_mask": padding(*lead, 9),
            "residual": torch.randn(*lead, 7, DIM),
        },
    ),
    "LayerNorm": Case(lambda: LayerNorm(DIM, eps=1e-6), lambda: TorchNorm(DIM, eps=1e-6), tokens_of),
    "MLP": Case(lambda: MLP(DIM, HIDDEN), lambda: TorchMLP(QuickGELU()), tokens_of),
    "MLP, gelu, residual": Case(
        lambda: MLP(DIM, HIDDEN, "gelu"),
        lambda: TorchMLP(nn.GELU()),
        lambda *lead: {**tokens_of(*lead), "residual": True},
    ),
    "TemporalBlock": Case(lambda: TemporalBlock(DIM, HEADS, mlp_ratio=2), lambda: TorchBlock(VISION), frames_of),
    "TemporalBlock without temporal modules": Case(
        lambda: TemporalBlock(DIM, HEADS, mlp_ratio=2, temporal=False), lambda: TorchPlainBlock(VISION), frames_of
    ),
    "FusionLayer": Case(
        **_fusion(True),
        inputs=lambda *lead: {
            **tokens_of(*lead),
            **memory_of(*lead),
            "key_padding_mask": padding(*lead, 7),
            "memory_mask": padding(*lead, 9),
        },
    ),
    "FusionLayer, causal": Case(
        **_fusion(True), inputs=lambda *lead: {**tokens_of(*lead), **memory_of(*lead), "causal": True}
    ),
    "FusionLayer without cross-attention": Case(
        **_fusion(False),
        inputs=lambda *lead: {**tokens_of(*lead), "key_padding_mask": padding(*lead, 7), "causal": True},
    ),
}
