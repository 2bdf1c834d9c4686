"""Layer norms of NVIDIA's apex, if installed. PyPI's package of that name is another project."""

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
    """Whether the installed apex is NVIDIA's. Looks only at files, because importing the other has side effects."""
    spec = importlib.util.find_spec("apex")
    return spec is not None and PathFinder.find_spec("apex.normalization", spec.submodule_search_locations) is not None


@functools.cache
def error() -> str | None:
    """Why apex's layer norms cannot be used here, with the remedy; None if they can."""
    if importlib.util.find_spec("apex") is None:
        return f"apex is not installed: {_SOURCE}"
    if not is_nvidias():
        return f"the installed apex is another project, from PyPI: {_SOURCE}"
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
        why.append(f"apex's layer norm supports float32, bfloat16 and float16, got {x.dtype}")
    if (weight is None) != (bias is None):
        why.append("apex's layer norm needs both weight and bias, or neither")
    why += [
        f"{name} is {parameter.dtype}, x is {x.dtype}"
        for name, parameter in (("weight", weight), ("bias", bias))
        if parameter is not None and parameter.dtype != x.dtype
    ]
    if x.numel() == 0:
        why.append("apex's layer norm does not support empty inputs")
    return why


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last axis, which autograd can follow."""
    norms = importlib.import_module("apex.normalization.fused_layer_norm")
    shape = (x.shape[-1],)
    # Apex's functions cast under autocast. Without it the result keeps x's dtype.
    with torch.autocast(x.device.type, enabled=False):
        if weight is None:
            return norms.fused_layer_norm(x.contiguous(), shape, eps)
        return norms.fused_layer_norm_affine(x.contiguous(), weight, bias, shape, eps)
