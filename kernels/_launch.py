"""How kernels are launched: on the device of their tensors, with the configuration that is best for it.

A `Kernel` is a Triton function with the configurations worth trying. On a GPU the first launch with a new key tries
them all (see `_tuning`); under Triton's interpreter a small one is used; within `record` nothing is launched at all,
and what would have been is told, to be compiled ahead of time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mplug2_fast.kernels import _tuning
from mplug2_fast.kernels._tuning import Config

Configs = Sequence[Config] | Callable[[Mapping[str, Any], int], Sequence[Config]]
Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]

_recorder: ContextVar[Recorder | None] = ContextVar("mplug2_fast_launches", default=None)
_overlapped: ContextVar[bool] = ContextVar("mplug2_fast_overlapped", default=False)


@dataclass(frozen=True)
class Tiles:
    """A matrix that a kernel takes as a tensor descriptor, for the tensor memory accelerator to read and write in
    blocks: a dense last axis, rows 16-byte aligned, and the constants of the launch that tell a block's shape."""

    matrix: Tensor
    block: tuple[str, ...]

    def shape(self, constants: Mapping[str, Any]) -> list[int]:
        return [constants[name] for name in self.block]


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded: arguments and constants by name, and every configuration that might serve it."""

    kernel: str
    function: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    configs: Sequence[Config]


@dataclass
class Recorder:
    """Launches in order. `capability`: the compute capability they are for, 80 for 8.0."""

    capability: int
    launches: list[Launch] = field(default_factory=list)


@contextlib.contextmanager
def record(capability: int) -> Iterator[Recorder]:
    """Within the context, of this thread or task alone, kernels are not launched but told. Tensors may be on `meta`."""
    token = _recorder.set(recorder := Recorder(capability))
    try:
        yield recorder
    finally:
        _recorder.reset(token)


@contextlib.contextmanager
def overlapped() -> Iterator[None]:
    """Within the context, of this thread or task alone, kernels that are `early` start before the one before them has
    ended, on compute capability 9.0 and later, and read meanwhile what no kernel of the context writes: weights, and
    what was there before. The context begins with a kernel that is not early, and so sees all that ran before it."""
    token = _overlapped.set(True)
    try:
        yield
    finally:
        _overlapped.reset(token)


def interpreted() -> bool:
    return triton.knobs.runtime.interpret


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device, 90 for 9.0; that which is recorded for, or 0 under the interpreter."""
    if recorder := _recorder.get():
        return recorder.capability
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """How many programs run at a time, for kernels whose programs take several tiles each."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if interpreted() else 132


class Kernel:
    """A Triton function and the configurations to launch it with.

    Args:
        function: decorated with `triton.jit`.
        configs: in order of preference, those for any GPU, or a function of the launch's constants and the compute
            capability.
        interpreted: for Triton's interpreter, where time goes by the number of programs.
        early: whether the function has a constant EARLY: that it starts within `overlapped` before the kernel before it
            has ended, and has to wait for that one's results itself.
    """

    def __init__(self, function: Any, configs: Configs, interpreted: Config, *, early: bool = False) -> None:
        self.function, self.configs, self.interpreted, self.early = function, configs, interpreted, early
        self.name = function.fn.__name__

    def __call__(self, grid: Grid, *arguments: Any, key: tuple[Any, ...] = (), **constants: Any) -> None:
        """Launches on the device of the first tensor among the arguments.

        Args:
            grid: from all constants, those of the configuration included, to the numbers of programs.
            key: what the best configuration depends on, beside the types of the arguments and the constants. Sizes
                belong here, rounded, so that not every length is tuned anew.
        """
        tensors = [a.matrix if isinstance(a, Tiles) else a for a in arguments if isinstance(a, (Tensor, Tiles))]
        device = tensors[0].device
        configs = self._configs(constants, device)
        early = self.early and _overlapped.get() and capability(device) >= 90
        if self.early:
            constants["EARLY"] = early
        if recorder := _recorder.get():
            names = [name for name in self.function.arg_names if name not in constants]
            named = dict(zip(names, arguments, strict=False))
            recorder.launches.append(Launch(self.name, self.function, named, constants, configs))
            return

        def launch(config: Config) -> None:
            meta = {**constants, **config.constants}
            options = {} if interpreted() else {"num_warps": config.num_warps, "num_stages": config.num_stages}
            if early:
                options["launch_pdl"] = True
            described = [
                TensorDescriptor.from_tensor(a.matrix, a.shape(meta)) if isinstance(a, Tiles) else a for a in arguments
            ]
            self.function[grid(meta)](*described, **meta, **options)

        # A launch goes to the current device, wherever its tensors are.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            if device.type != "cuda" or len(configs) == 1:
                launch(configs[0])
                return
            types = tuple(str(t.dtype).removeprefix("torch.") for t in tensors)
            launch(_tuning.best(self, configs, device, (*types, *constants.items(), *key), launch))

    def _configs(self, constants: Mapping[str, Any], device: torch.device) -> Sequence[Config]:
        if interpreted():
            return [self.interpreted]
        return self.configs if not callable(self.configs) else self.configs(constants, capability(device))


def power_of_2(size: int, at_least: int = 1) -> int:
    """The least power of two that is not below `size`."""
    return max(at_least, triton.next_power_of_2(max(1, size)))


def given(tensor: Tensor | None, other: Tensor) -> Tensor:
    """An address for an argument that is not read."""
    return other if tensor is None else tensor
