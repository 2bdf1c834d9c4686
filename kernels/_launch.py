"""How kernels are launched: on the device of their tensors, with the configuration that is best for it.

A `Kernel` is a Triton function with the configurations worth trying. On a GPU the first launch with a new key tries
them all (see `_tuning`), and a launch like one before goes straight to the compiled kernel; under Triton's interpreter
a small configuration is used; within `record` nothing is launched at all, and what would have been is told, to be
compiled ahead of time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mplug2_fast.kernels import _tuning
from mplug2_fast.kernels._tuning import Config

Configs = Sequence[Config] | Callable[[Mapping[str, Any], int], Sequence[Config]]
Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]

_INTERPRETED: bool = triton.knobs.runtime.interpret
_MOST_READY = 4096
"""Launches that a kernel remembers."""

_recorder: ContextVar[Recorder | None] = ContextVar("mplug2_fast_launches", default=None)
_overlapped: ContextVar[bool] = ContextVar("mplug2_fast_overlapped", default=False)


class Tiles(NamedTuple):
    """A matrix that a kernel takes as a tensor descriptor, for the tensor memory accelerator to read and write in
    blocks: what lies at a tensor's address, its shape, a stride of rows that are 16-byte aligned, and the constants of
    the launch that tell a block's shape."""

    tensor: Tensor
    shape: tuple[int, int]
    row_stride: int
    block: tuple[str, str]

    def block_shape(self, constants: Mapping[str, Any]) -> list[int]:
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
    return _INTERPRETED


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device, 90 for 9.0; that which is recorded for, or 0 under the interpreter."""
    if recorder := _recorder.get():
        return recorder.capability
    return _capability(device) if device.type == "cuda" else 0


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at a time, for kernels whose programs take several tiles each."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if interpreted() else 132


class _Ready(NamedTuple):
    """A launch that was made, for those like it: all constants, those that the function takes last in its order, the
    shapes of the blocks of its descriptors, and the compiled kernel."""

    constants: Mapping[str, Any]
    last: tuple[Any, ...]
    blocks: tuple[list[int], ...]
    compiled: Any

    def __call__(self, grid: Grid, arguments: Sequence[Any]) -> None:
        if self.blocks:
            blocks = iter(self.blocks)
            arguments = [_descriptor(a, next(blocks)) if type(a) is Tiles else a for a in arguments]
        self.compiled[(*grid(self.constants), 1, 1)[:3]](*arguments, *self.last)


class Kernel:
    """A Triton function and the configurations to launch it with.

    Args:
        function: decorated with `triton.jit`; its constants come last.
        configs: in order of preference, those for any GPU, or a function of the launch's constants and the compute
            capability.
        interpreted: for Triton's interpreter, where time goes by the number of programs.
        early: whether the function has a constant EARLY: that it starts within `overlapped` before the kernel before it
            has ended, and has to wait for that one's results itself.
    """

    def __init__(self, function: Any, configs: Configs, interpreted: Config, *, early: bool = False) -> None:
        self.function, self.configs, self.interpreted, self.early = function, configs, interpreted, early
        self.name = function.fn.__name__
        self._ready: dict[tuple[Any, ...], _Ready] = {}

    def __call__(self, grid: Grid, *arguments: Any, key: tuple[Any, ...] = (), **constants: Any) -> None:
        """Launches on the device of the arguments, of which the first is a tensor or a `Tiles`.

        Args:
            grid: from all constants, those of the configuration included, to the numbers of programs.
            key: what the best configuration depends on, beside the types of the arguments and the constants. Sizes
                belong here, rounded, so that not every length is tuned anew.
        """
        first = arguments[0].tensor if type(arguments[0]) is Tiles else arguments[0]
        if self.early:
            constants["EARLY"] = _overlapped.get() and capability(first.device) >= 90
        if recorder := _recorder.get():
            names = [name for name in self.function.arg_names if name not in constants]
            named = dict(zip(names, arguments, strict=False))
            configs = self._configs(constants, first.device)
            recorder.launches.append(Launch(self.name, self.function, named, constants, configs))
        elif not first.is_cuda:
            self._launch(grid, arguments, constants, self._configs(constants, first.device)[0])
        elif first.get_device() == torch.cuda.current_device():
            self._launch_there(grid, arguments, constants, key, first.device)
        else:  # a launch goes to the current device, wherever its tensors are
            with torch.cuda.device(first.device):
                self._launch_there(grid, arguments, constants, key, first.device)

    def _launch_there(
        self,
        grid: Grid,
        arguments: Sequence[Any],
        constants: dict[str, Any],
        key: tuple[Any, ...],
        device: torch.device,
    ) -> None:
        """On the current device: like a launch before, or else with the configuration that is found to be best."""
        like = (_tuning.setting(), device, key, *constants.items(), *map(_specialised, arguments))
        if (ready := self._ready.get(like)) is not None:
            ready(grid, arguments)
            return
        configs = self._configs(constants, device)
        config = configs[0]
        if len(configs) > 1:
            tensors = [a.tensor if type(a) is Tiles else a for a in arguments if isinstance(a, (Tensor, Tiles))]
            types = tuple(str(t.dtype).removeprefix("torch.") for t in tensors)
            launch = functools.partial(self._launch, grid, arguments, constants)
            config = _tuning.best(self, configs, device, (*types, *constants.items(), *key), launch)
        ready = self._launch(grid, arguments, constants, config)
        if not torch.cuda.is_current_stream_capturing():  # when nothing is tuned
            if len(self._ready) >= _MOST_READY:
                self._ready.clear()
            self._ready[like] = ready

    def _launch(self, grid: Grid, arguments: Sequence[Any], constants: Mapping[str, Any], config: Config) -> _Ready:
        meta = {**constants, **config.constants}
        options = {} if interpreted() else {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if constants.get("EARLY"):
            options["launch_pdl"] = True
        blocks = tuple(a.block_shape(meta) for a in arguments if type(a) is Tiles)
        described = [
            TensorDescriptor(a.tensor, list(a.shape), [a.row_stride, 1], a.block_shape(meta)) if type(a) is Tiles else a
            for a in arguments
        ]
        compiled = self.function[grid(meta)](*described, **meta, **options)
        last = tuple(meta[name] for name in self.function.arg_names[len(arguments) :])
        return _Ready(meta, last, blocks, compiled)

    def _configs(self, constants: Mapping[str, Any], device: torch.device) -> Sequence[Config]:
        if interpreted():
            return [self.interpreted]
        return self.configs if not callable(self.configs) else self.configs(constants, capability(device))


def _specialised(argument: Any) -> Any:
    """All of an argument that a compiled kernel may be made for: of addresses, how they are aligned."""
    kind = type(argument)
    if kind is int:
        return argument
    if kind is float:
        return float
    if kind is Tiles:
        tensor, shape, row_stride, block = argument
        return tensor.dtype, tensor.data_ptr() % 16, shape, row_stride, block
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return kind, argument


def _descriptor(tiles: Tiles, block: list[int]) -> TensorDescriptor:
    """Of tiles like others that were found to be right."""
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = tiles.tensor, list(tiles.shape), [tiles.row_stride, 1]
    made.block_shape = block
    return made


def cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)


def power_of_2(size: int, at_least: int = 1) -> int:
    """The least power of two that is not below `size`."""
    return max(at_least, 1 << (max(1, size) - 1).bit_length())


def given(tensor: Tensor | None, other: Tensor) -> Tensor:
    """An address for an argument that is not read."""
    return other if tensor is None else tensor
