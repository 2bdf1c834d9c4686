"""When a call must be computed by PyTorch's own operators, and when a mode must see it.

Kernels read memory. Transforms of torch.func, forward-mode derivatives, traces and tensor subclasses follow PyTorch's
operators only: inside a kernel they would see nothing, and give zeros or constants.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = frozenset(("torch", "reference"))
"""Backends made of PyTorch's operators, which anything can follow."""

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_transforms, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


def is_ordinary(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing follows the call: neither `is_needed` nor `is_watched`, in one look."""
    return (
        _transforms() is None
        and forward_ad._current_level < 0
        and _tracing() is None
        and not _dispatch_modes()
        and not _function_modes()
        and _PLAIN.issuperset(map(type, tensors))
    )


def is_needed(tensors: Sequence[Tensor]) -> bool:
    """Whether `reason` has one. Cheap: every call asks."""
    if _transforms() is not None or forward_ad._current_level >= 0 or _tracing() is not None:
        return True
    return not _PLAIN.issuperset(map(type, tensors)) and _subclass(tensors) is not None


def reason(tensors: Sequence[Tensor]) -> str | None:
    """Why only PyTorch's own operators can compute with these tensors here; None where kernels can."""
    if _transforms() is not None:
        return "a transform of torch.func is active, which follows PyTorch's own operators only"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active, which follows PyTorch's own operators only"
    if _tracing() is not None:
        return "torch.jit.trace is recording, which sees PyTorch's own operators only"
    if (found := _subclass(tensors)) is not None:
        return f"a tensor is a {found.__name__}, which PyTorch's own operators know"
    return None


def are_followed(grads: Sequence[Tensor | None]) -> bool:
    """Whether gradients of many results at once, `is_grads_batched`, or a transform pass through a backward."""
    given = [grad for grad in grads if grad is not None]
    return is_needed(given) or any(map(_is_batched, given))


def differentiates() -> bool:
    """Whether a transform or forward-mode differentiation is active, which may ask for derivatives of any order."""
    return _transforms() is not None or forward_ad._current_level >= 0


def have_tangents(tensors: Sequence[Tensor]) -> bool:
    """Whether forward-mode derivatives pass through these tensors."""
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _subclass(tensors: Sequence[Tensor]) -> type | None:
    """The first type that is neither a plain tensor nor one of those by which PyTorch's compilers trace operators."""
    others = [type(t) for t in tensors if type(t) not in _PLAIN]
    if not others:
        return None
    # Imported here: half a second. Whoever has such tensors has imported it.
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return next((t for t in others if not issubclass(t, (FakeTensor, FunctionalTensor))), None)


def is_watched(tensors: Sequence[Tensor]) -> bool:
    """Whether a mode, or a compiler's tensor, is to see the operator itself."""
    if _dispatch_modes() or (_function_modes() and _has_function_modes()):
        return True
    return not _PLAIN.issuperset(map(type, tensors))


def _has_function_modes() -> bool:
    """Whether there is one besides that of `torch.set_default_device`, which concerns new tensors alone."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return not all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
