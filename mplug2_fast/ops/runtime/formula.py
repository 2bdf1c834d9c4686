"""When PyTorch's own operators must compute a call, and when a mode must see the operator.

Kernels read memory. Transforms of torch.func, forward-mode differentiation, traces and tensor subclasses follow only
PyTorch's operators. They cannot see into a kernel, and would give zeros or constants.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mplug2_fast.ops.runtime.memory import PLAIN_TYPES

BACKENDS = frozenset(("torch", "reference"))
"""Backends made of PyTorch's operators."""

_transforms, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


def nothing_follows() -> bool:
    """Whether no transform or mode is active, so that outside of a trace `is_needed` and `is_watched` depend on types
    alone."""
    return _transforms() is None and forward_ad._current_level < 0 and not _dispatch_modes() and not _function_modes()


def is_needed(tensors: Sequence[Tensor]) -> bool:
    """Whether `reason` finds one."""
    if _transforms() is not None or forward_ad._current_level >= 0 or _tracing() is not None:
        return True
    return not PLAIN_TYPES.issuperset(map(type, tensors)) and _subclass(tensors) is not None


def reason(tensors: Sequence[Tensor]) -> str | None:
    """Why only PyTorch's own operators can compute with these tensors here; None if kernels can."""
    if _transforms() is not None:
        return "a transform of torch.func is active, which follows PyTorch's own operators only"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active, which follows PyTorch's own operators only"
    if _tracing() is not None:
        return "torch.jit.trace is recording, which sees PyTorch's own operators only"
    if (found := _subclass(tensors)) is not None:
        return f"a tensor is a {found.__name__}, which only PyTorch's own operators can read"
    return None


def are_followed(grads: Sequence[Tensor | None]) -> bool:
    """Whether batched gradients (`is_grads_batched`) or a transform pass through a backward."""
    given = [grad for grad in grads if grad is not None]
    return is_needed(given) or any(map(_is_batched, given))


def differentiates() -> bool:
    """Whether a transform or forward-mode differentiation is active, which may need derivatives of any order."""
    return _transforms() is not None or forward_ad._current_level >= 0


def have_tangents(tensors: Sequence[Tensor]) -> bool:
    """Whether forward-mode derivatives pass through these tensors."""
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _subclass(tensors: Sequence[Tensor]) -> type | None:
    """The first type that is neither a plain tensor nor one that PyTorch's compilers use to trace operators."""
    others = [type(t) for t in tensors if type(t) not in PLAIN_TYPES]
    if not others:
        return None
    # Imported here because it takes half a second. Code that makes such tensors has imported it.
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return next((t for t in others if not issubclass(t, (FakeTensor, FunctionalTensor))), None)


def is_watched(tensors: Sequence[Tensor]) -> bool:
    """Whether a mode or a compiler's tensor must see the operator itself."""
    if _dispatch_modes() or (_function_modes() and _has_function_modes()):
        return True
    return not PLAIN_TYPES.issuperset(map(type, tensors))


def _has_function_modes() -> bool:
    """Whether there is one besides that of `torch.set_default_device`, which only affects new tensors."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return not all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
