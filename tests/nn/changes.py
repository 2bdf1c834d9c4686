"""Changes to a part of a module that do not change its result and record its calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Calls = list[str]
Change = Callable[[nn.Module, str, Calls], None]
"""Takes a module, the name of a part, and a list to which each call of the part appends the name."""


def owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The parent module of a part, and the part's name in it."""
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


def replace(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, last = owner(module, name)
    setattr(parent, last, part.train(parent.training))


class Wrapper(nn.Module):
    """Wraps a part, as adapters and checkpoint wrappers do."""

    def __init__(self, part: nn.Module, called: Callable[[], None]) -> None:
        super().__init__()
        self.part, self.called = part, called

    def forward(self, *args, **kwargs):
        self.called()
        return self.part(*args, **kwargs)


class Same(nn.Module):
    """A parametrisation that records when the parameter is read."""

    def __init__(self, called: Callable[[], None]) -> None:
        super().__init__()
        self.called = called

    def forward(self, value: Tensor) -> Tensor:
        self.called()
        return value + 0.0


def _hook(kind: str, **options: bool) -> Change:
    def change(module: nn.Module, name: str, calls: Calls) -> None:
        part = module.get_submodule(name)
        getattr(part, f"register_{kind}")(lambda *_: calls.append(name), **options)

    return change


def own_forward(module: nn.Module, name: str, calls: Calls) -> None:
    part = module.get_submodule(name)
    original = part.forward

    def forward(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    part.forward = forward


def subclass(module: nn.Module, name: str, calls: Calls) -> None:
    part = module.get_submodule(name)
    kind = type(part)

    class Own(kind):
        def forward(self, *args, **kwargs):
            calls.append(name)
            return super().forward(*args, **kwargs)

    part.__class__ = Own


def wrapper(module: nn.Module, name: str, calls: Calls) -> None:
    replace(module, name, Wrapper(module.get_submodule(name), lambda: calls.append(name)))


def compiled(module: nn.Module, name: str, calls: Calls) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        def run(*args):
            calls.append(name)
            return graph(*args)

        return run

    replace(module, name, torch.compile(module.get_submodule(name), backend=backend))


def parametrisation(module: nn.Module, name: str, calls: Calls) -> None:
    part = module.get_submodule(name)
    for parameter in list(dict(part.named_parameters(recurse=False))):
        parametrize.register_parametrization(part, parameter, Same(lambda: calls.append(name)))


CALLS: dict[str, Change] = {
    "forward hook": _hook("forward_hook"),
    "forward hook, always called": _hook("forward_hook", always_call=True),
    "forward hook with keywords": _hook("forward_hook", with_kwargs=True),
    "forward pre-hook": _hook("forward_pre_hook"),
    "forward pre-hook with keywords": _hook("forward_pre_hook", with_kwargs=True),
    "forward on the instance": own_forward,
    "subclass": subclass,
    "wrapper": wrapper,
}
"""Changes that see every call of a part."""

GRADIENTS: dict[str, Change] = {
    "backward hook": _hook("full_backward_hook"),
    "backward pre-hook": _hook("full_backward_pre_hook"),
}
"""Changes that see a part's gradients."""
