"""NVIDIA's apex, whose layer norms serve where it is installed. PyPI's package of that name is another project."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from importlib.machinery import PathFinder

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SOURCE = "NVIDIA's is built from github.com/NVIDIA/apex with its CUDA extensions"


def is_nvidias() -> bool:
    """Whether the apex that is installed is NVIDIA's; told by its files, for the other one does too much on import."""
    spec = importlib.util.find_spec("apex")
    return spec is not None and PathFinder.find_spec("apex.normalization", spec.submodule_search_locations) is not None


@functools.cache
def error() -> str | None:
    """Why apex has no layer norms here, with the remedy; None where it has."""
    if importlib.util.find_spec("apex") is None:
        return f"apex is not installed: {_SOURCE}"
    if not is_nvidias():
        return f"the apex that is installed is another project, PyPI's: {_SOURCE}"
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        return f"apex was built without fused_layer_norm_cuda: {_SOURCE}"
    try:
        importlib.import_module("fused_layer_norm_cuda")
        importlib.import_module("apex.normalization.fused_layer_norm")
    except Exception as found:
        return f"apex cannot be imported ({type(found).__name__}: {found}): build it for this torch"
    return None


def reasons(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[str]:
    """Why apex's layer norm cannot serve these arguments."""
    if found := error():
        return [found]
    why = []
    if x.dtype not in DTYPES:
        why.append(f"apex's layer norm is for float32, bfloat16 and float16, not {x.dtype}")
    if (weight is None) != (bias is None):
        why.append("apex's layer norm takes weight and bias, or neither")
    why += [
        f"{name} is {parameter.dtype}, x is {x.dtype}"
        for name, parameter in (("weight", weight), ("bias", bias))
        if parameter is not None and parameter.dtype != x.dtype
    ]
    if x.numel() == 0:
        why.append("apex's layer norm needs a row")
    return why


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last axis, which autograd can follow."""
    norms = importlib.import_module("apex.normalization.fused_layer_norm")
    shape = (x.shape[-1],)
    # Its functions cast under autocast; here the result has the type of x.
    with torch.autocast(x.device.type, enabled=False):
        if weight is None:
            return norms.fused_layer_norm(x.contiguous(), shape, eps)
        return norms.fused_layer_norm_affine(x.contiguous(), weight, bias, shape, eps)
