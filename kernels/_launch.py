"""Launches kernels on the device of their tensors, with the best configuration for that device.

A `Kernel` is a Triton function with the configurations worth trying. On a GPU the first launch with a new key tries
them all (see `_tuning`); a repeated launch calls the compiled kernel directly. Triton's interpreter uses one small
configuration. Within `record` nothing runs: the launches are recorded, to be compiled ahead of time.
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
"""Compiled launches that a kernel remembers."""

_recorder: ContextVar[Recorder | None] = ContextVar("mplug2_fast_launches", default=None)
_overlapped: ContextVar[bool] = ContextVar("mplug2_fast_overlapped", default=False)


class Tiles(NamedTuple):
    """A matrix that a kernel takes as a tensor descriptor: the tensor memory accelerator reads and writes it in blocks.

    It starts at the tensor's address. Its rows are 16-byte aligned. `block` names the constants of the launch that give
    the shape of a block.
    """

    tensor: Tensor
    shape: tuple[int, int]
    row_stride: int
    block: tuple[str, str]

    def block_shape(self, constants: Mapping[str, Any]) -> list[int]:
        return [constants[name] for name in self.block]


@dataclass(frozen=True)
class Launch:
    """A recorded launch: arguments and constants by name, and every configuration that might be chosen."""

    kernel: str
    function: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    configs: Sequence[Config]


@dataclass
class Recorder:
    """Recorded launches, in order. `capability`: the compute capability of the device, 80 for 8.0."""

    capability: int
    launches: list[Launch] = field(default_factory=list)


@contextlib.contextmanager
def record(capability: int) -> Iterator[Recorder]:
    """Records launches of this thread or task instead of running them. Tensors may be on `meta`."""
    token = _recorder.set(recorder := Recorder(capability))
    try:
        yield recorder
    finally:
        _recorder.reset(token)


@contextlib.contextmanager
def overlapped() -> Iterator[None]:
    """Lets `early` kernels of this thread or task start before the previous kernel has ended.

    It needs compute capability 9.0 or later. Until the previous kernel ends, an early kernel reads only what no kernel
    in the context writes, such as weights. The first kernel in the context must not be early, so that it sees the
    results of all earlier work.
    """
    token = _overlapped.set(True)
    try:
        yield
    finally:
        _overlapped.reset(token)


def interpreted() -> bool:
    return _INTERPRETED


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device, 90 for 9.0. While recording, the recorder's. 0 under the interpreter."""
    if recorder := _recorder.get():
        return recorder.capability
    return _capability(device) if device.type == "cuda" else 0


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors: kernels whose programs process several tiles start one program on each."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if interpreted() else 132


class _Ready(NamedTuple):
    """A compiled launch, to be repeated with other tensors of the same kind.

    Attributes:
        constants: all constants by name. last: those that the function takes last, in its order.
        blocks: block shapes of its descriptors.
        compiled: the compiled kernel.
    """

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
        configs: in order of preference, for any GPU; or a function of the constants and the compute capability.
        interpreted: for Triton's interpreter, whose time depends on the number of programs.
        early: whether the function has a constant EARLY. If that is set, it starts before the previous kernel has ended
            (see `overlapped`) and must wait for its results itself.
    """

    def __init__(self, function: Any, configs: Configs, interpreted: Config, *, early: bool = False) -> None:
        self.function, self.configs, self.interpreted, self.early = function, configs, interpreted, early
        self.name = function.fn.__name__
        self._ready: dict[tuple[Any, ...], _Ready] = {}

    def __call__(self, grid: Grid, *arguments: Any, key: tuple[Any, ...] = (), **constants: Any) -> None:
        """Launches on the device of the arguments, of which the first is a tensor or a `Tiles`.

        Args:
            grid: all constants, with those of the configuration, to the number of programs along each axis.
            key: what else the best configuration depends on, besides the constants and the types of the arguments. Put
                rounded sizes here, so that not every length is tuned separately.
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
        else:  # Triton launches on the current device, not on that of the tensors
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
        """Launches on the current device: repeats an equal launch, or finds the best configuration."""
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
        if not torch.cuda.is_current_stream_capturing():  # during capture nothing is tuned
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
    """What Triton specialises a kernel on: an argument's type and value; for addresses, their alignment."""
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
    """A descriptor without the checks, which an equal launch has passed."""
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = tiles.tensor, list(tiles.shape), [tiles.row_stride, 1]
    made.block_shape = block
    return made


def cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)


def power_of_2(size: int, at_least: int = 1) -> int:
    """The smallest power of two that is at least `size`."""
    return max(at_least, 1 << (max(1, size) - 1).bit_length())


def given(tensor: Tensor | None, other: Tensor) -> Tensor:
    """The tensor, or for None another one as a placeholder that the kernel does not read."""
    return other if tensor is None else tensor
