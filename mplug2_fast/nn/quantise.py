"""Makes the weights of a model 8-bit numbers, for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.nn.attention import FusedProjections
from mplug2_fast.nn.bert_layer import BertEmbeddings
from mplug2_fast.nn.int8 import Int8Embedding, Int8Linear
from mplug2_fast.nn.local_temporal import LocalTemporal
from mplug2_fast.nn.temporal_block import TemporalBlock
from mplug2_fast.nn.text_decoder import TextDecoder

_PRODUCTS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def quantise(module: nn.Module, bits: int = 8, keep: Callable[[str], bool] = lambda _: False) -> list[str]:
    """Replaces the linear layers inside a module, and the projections of its attentions, by ones with 8-bit weights.

    The word embeddings of a decoder, which are the weight of its last layer, are replaced too. Where one such layer
    alone reads a layer norm, both are smoothed first, see `smooth`.

    Args:
        bits: to which the layers round their inputs, see `ops.linear_int8`.
        keep: whether the layer of this name, relative to the module, stays as it is.

    Returns the names of the replaced layers.
    """
    found = []
    for name, norm, weight in _normed(module):
        if not keep(name):
            smooth(norm, weight)
    for name, _layer, replace in list(_layers(module)):
        if not keep(name):
            replace(bits)
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


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module, Callable[[int], None]]]:
    for prefix, parent in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(parent, FusedProjections) and parent.in_proj_weight is not None:
            yield f"{dot}in_proj", parent, lambda bits, parent=parent: _replace_projections(parent, bits)
        if isinstance(parent, TextDecoder) and type(parent.embeddings.word) is nn.Embedding:
            embeddings = parent.embeddings
            yield f"{dot}embeddings.word", embeddings, lambda bits, at=embeddings: _replace_words(at)
        for name, child in parent.named_children():
            if type(child) in _PRODUCTS and child.weight[0, 0].numel() == 1 and getattr(child, "groups", 1) == 1:
                yield f"{dot}{name}", child, lambda bits, *at, parent=parent, name=name: _replace(parent, name, bits)


def _replace(parent: nn.Module, name: str, bits: int) -> None:
    layer: Any = getattr(parent, name)
    setattr(parent, name, Int8Linear.of(layer.weight, layer.bias, bits).train(layer.training))


def _replace_words(parent: BertEmbeddings) -> None:
    parent.word = Int8Embedding.of(parent.word.weight).train(parent.training)


def _replace_projections(parent: FusedProjections, bits: int) -> None:
    made = Int8Linear.of(parent.in_proj_weight, parent.in_proj_bias, bits).train(parent.training)
    parent.in_proj_weight = parent.in_proj_bias = None
    parent.in_proj = made
