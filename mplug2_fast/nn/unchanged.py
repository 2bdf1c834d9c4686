"""Decides whether an operator may compute with a module's weights instead of calling the module.

Adapters, pruning, parametrisations and quantisation change what a module computes. Hooks, wrappers and offloading must
see its calls. A module with any of these must be called.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

Kinds = frozenset[type[nn.Module]]

TENSORS = frozenset((Tensor, nn.Parameter, type(None), FakeTensor, FunctionalTensor))
"""Tensor types that operators accept as weights, including those of tracing. Modules with other subclasses of `Tensor`,
such as quantised or sharded weights, must be called."""


def unchanged(kinds: Kinds, *modules: nn.Module) -> bool:
    """Whether every module is exactly of one of these classes, without hooks, without a `forward` on the instance and
    with ordinary parameters. Global hooks count as hooks."""
    if _has_any_global_hook():
        return False
    for module in modules:
        own = module.__dict__
        if (
            type(module) not in kinds
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return False
        for tensor in own["_parameters"].values():
            if type(tensor) not in TENSORS:
                return False
    return True
