"""Makes the weights of a model 8-bit numbers, for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.nn.attention import FusedProjections
from mplug2_fast.nn.bert_layer import BertEmbeddings, BertLayer
from mplug2_fast.nn.eight_bit import EightBitLinear
from mplug2_fast.nn.int8 import Int8Embedding, Int8Linear
from mplug2_fast.nn.local_temporal import LocalTemporal
from mplug2_fast.nn.temporal_block import TemporalBlock
from mplug2_fast.nn.text_decoder import TextDecoder

_PRODUCTS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def quantise(
    module: nn.Module,
    bits: int = 8,
    keep: Callable[[str], bool] = lambda _: False,
    kind: type[EightBitLinear] = Int8Linear,
) -> list[str]:
    """Replaces the linear layers inside a module, and the projections of its attentions, by ones with 8-bit weights.

    In int8 the word embeddings of a decoder, which are the weight of its last layer, are replaced too. Where one such
    layer alone reads a layer norm, both are smoothed first, see `smooth`.

    Args:
        bits: to which the layers round their inputs, see `ops.linear_int8`.
        keep: whether the layer of this name, relative to the module, stays as it is.
        kind: of the new layers, which says the format of their weights.

    Returns the names of the replaced layers.
    """
    found = []
    for name, norm, weight in _normed(module):
        if not keep(name):
            smooth(norm, weight)
    for name, replace in list(_layers(module, kind)):
        if not keep(name):
            replace(bits)
            found.append(name)
    return found


def quantise_memory_projections(
    module: nn.Module, keep: Callable[[str], bool] = lambda _: False, kind: type[EightBitLinear] = Int8Linear
) -> list[str]:
    """As `quantise`, for only those projections inside a module that give the keys and values of a memory."""
    found = []
    for prefix, parent in list(module.named_modules()):
        attention = getattr(parent, "crossattention", None) if isinstance(parent, BertLayer) else None
        name = f"{prefix}.crossattention.self.memory_proj".lstrip(".")
        if attention is None or attention.self.in_proj_weight is None or "memory_proj" in attention.self._modules:
            continue
        if not keep(name):
            _replace_memory_projections(attention.self, kind)
            found.append(name)
    return found


@torch.no_grad()
def smooth(norm: nn.Module, weight: Tensor) -> None:
    """Moves outliers from the results of a layer norm into the weight `(out_features, channels)` that alone reads them.

    A row that has a few large channels is rounded coarsely. They are divided by a factor, and the weight's columns
    multiplied, so that both are about equally large. The norm's weight and bias say how large a channel becomes. The
    factors are powers of two: the product stays the same bit for bit.

    Source: SmoothQuant (arXiv 2211.10438), section 4, with the norm's parameters in place of measured activations.
    """
    factor = smoothing(norm, weight)
    for vector in (norm.weight, norm.bias):
        if vector is not None:
            vector.div_(factor)
    weight.mul_(factor)


def smoothing(norm: nn.Module, weight: Tensor) -> Tensor:
    """The factors of `smooth`, `(channels,)`, float32."""
    size = 3 * norm.weight.float().abs() + (0 if norm.bias is None else norm.bias.float().abs())
    most = weight.float().abs().amax(dim=0)
    ratio = torch.where((size > 0) & (most > 0), size / most, 1.0).log2() / 2
    return torch.exp2((ratio - ratio.mean()).round())


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of layers to keep matches a layer, or a module that it is in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _normed(module: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Layer norms that one product alone reads: the product's name, the norm, and the weight as a matrix."""
    for prefix, parent in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(parent, TemporalBlock):
            if parent.attn.in_proj_weight is not None:
                yield f"{dot}attn.in_proj", parent.ln_1, parent.attn.in_proj_weight
            if type(parent.mlp.c_fc) in _PRODUCTS:
                yield f"{dot}mlp.c_fc", parent.ln_2, parent.mlp.c_fc.weight
        elif isinstance(parent, LocalTemporal) and parent.ln is not None and type(parent.down_proj) in _PRODUCTS:
            yield f"{dot}down_proj", parent.ln, parent.down_proj.weight.flatten(1)


def _layers(module: nn.Module, kind: type[EightBitLinear]) -> Iterator[tuple[str, Callable[[int], None]]]:
    for prefix, parent in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        is_fused = isinstance(parent, FusedProjections) and "memory_proj" not in parent._modules
        if is_fused and parent.in_proj_weight is not None:
            yield f"{dot}in_proj", lambda bits, parent=parent: _replace_projections(parent, kind, bits)
        has_words = isinstance(parent, TextDecoder) and type(parent.embeddings.word) is nn.Embedding
        if has_words and kind is Int8Linear:
            yield f"{dot}embeddings.word", lambda bits, at=parent.embeddings: _replace_words(at)
        for name, child in parent.named_children():
            if type(child) in _PRODUCTS and child.weight[0, 0].numel() == 1 and getattr(child, "groups", 1) == 1:
                yield f"{dot}{name}", lambda bits, parent=parent, name=name: _replace(parent, name, kind, bits)


def _replace(parent: nn.Module, name: str, kind: type[EightBitLinear], bits: int) -> None:
    layer: Any = getattr(parent, name)
    setattr(parent, name, kind.of(layer.weight, layer.bias, bits).train(layer.training))


def _replace_words(parent: BertEmbeddings) -> None:
    parent.word = Int8Embedding.of(parent.word.weight).train(parent.training)


def _replace_projections(parent: FusedProjections, kind: type[EightBitLinear], bits: int) -> None:
    made = kind.of(parent.in_proj_weight, parent.in_proj_bias, bits).train(parent.training)
    parent.in_proj_weight = parent.in_proj_bias = None
    parent.in_proj = made


def _replace_memory_projections(parent: FusedProjections, kind: type[EightBitLinear]) -> None:
    queries, weight, bias = parent.embed_dim, parent.in_proj_weight.detach(), parent.in_proj_bias
    bias = None if bias is None else bias.detach()
    made = kind.of(weight[queries:], None if bias is None else bias[queries:].clone()).train(parent.training)
    parent.in_proj_weight = nn.Parameter(weight[:queries].clone(), requires_grad=False)
    parent.in_proj_bias = None if bias is None else nn.Parameter(bias[:queries].clone(), requires_grad=False)
    parent.memory_proj = made
