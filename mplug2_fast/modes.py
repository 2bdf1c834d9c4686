"""Training and evaluation mode of modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


def in_eval_mode(method: Callable[..., _T]) -> Callable[..., _T]:
    """A module's method that runs in evaluation mode, without dropout, and leaves the mode as it was."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> _T:
        if not self.training:
            return method(self, *args, **kwargs)
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            return method(self, *args, **kwargs)
        finally:
            for module in training:
                module.training = True

    return wrapped
