"""Whether modules are unchanged, so that an operator may compute with their weights instead of calling them.

Adapters, hooks, pruning, parametrisations, wrappers, quantisation and offloading change what a module computes, or must
see its call. Whoever owns a module with any of these has to call it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

Kinds = frozenset[type[nn.Module]]

TENSORS = frozenset((Tensor, nn.Parameter, type(None), FakeTensor, FunctionalTensor))
"""What operators take as weights, including the tensors of tracing. Other subclasses of `Tensor`, such as quantised or
sharded weights, need the module's own call."""


def unchanged(kinds: Kinds, *modules: nn.Module) -> bool:
    """Whether every module is exactly of one of these classes and has neither hooks nor a `forward` on the instance nor
    parameters of another tensor type. Hooks on all modules count as hooks."""
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
