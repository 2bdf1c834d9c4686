"""Runs a model's inference operation by operation or, on a GPU, as CUDA graphs.

A program is a function of tensors that yields after each part of its work. On a GPU each part becomes one graph.
Replaying a graph costs the host a few microseconds; launching its kernels one by one takes longer than running them.
Between parts the host can check whether the program is done.

The second call with tensors of the same shapes captures the whole program. Later calls copy their inputs in and replay
it. Graphs read weights from memory, so a weight that is written in place counts at once. Values that depend on weights
alone, such as the latents before they attend to a video, are computed inside the graph. The program is captured again
when a weight moves or changes its layout, or when a module is replaced. It is not captured while someone needs to see
every operation: with hooks, modules of other packages, gradients, or PyTorch dispatch modes.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mplug2_fast.nn.unchanged import TENSORS
from mplug2_fast.ops.runtime import backend

Program = Callable[..., Iterator[tuple[Tensor | None, tuple[Tensor, ...]]]]
"""Yields pairs: a bool on the device that is true when the program is done, or None; and the results so far."""

MAX_CACHED_GRAPHS = 8
"""Captured programs to keep, most recently used first. Each holds its inputs and results."""
MAX_KNOWN_CALLS = 64
"""Call signatures remembered, with and without graphs."""
PARTS_AHEAD = 2
"""Parts launched before the host waits for a `done` check: enough to keep the device busy."""
EAGER_PARTS = {"cpu": 1}
"""Parts between two `done` checks without graphs, by device type."""
DEFAULT_EAGER_PARTS = 4


class CudaGraphRunner:
    """Runs the programs of one model. Copies, such as those made when a model is copied or pickled, have no graphs."""

    def __init__(self) -> None:
        self.enabled = True
        self._captured: OrderedDict[Hashable, CapturedProgram | None] = OrderedDict()
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: Any) -> CudaGraphRunner:
        copied = CudaGraphRunner()
        copied.enabled = self.enabled
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return CudaGraphRunner, (), {"enabled": self.enabled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.enabled = state["enabled"]

    def run(
        self, model: nn.Module, name: Hashable, program: Program, inputs: Sequence[Tensor | None], parts: int
    ) -> tuple[Tensor, ...]:
        """Returns the results of `program(*inputs)`. Later calls do not overwrite them.

        Args:
            model: the model whose weights the program reads.
            name: identifies the program, including every setting it depends on besides the tensors.
            parts: how often the program yields if it is not done early.
        """
        tensors = [tensor for tensor in inputs if tensor is not None]
        if not self.enabled or not tensors or not can_capture(model, tensors):
            return run_eagerly(program, inputs)
        kinds = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in inputs)
        # Inference tensors cannot be written outside inference mode.
        modes = (
            backend.forced(),
            backend.is_strict(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.is_inference_mode_enabled(),
        )
        key = (name, kinds, *modes)
        with self._lock, torch.cuda.device(tensors[0].device):
            captured = self._find(model, key, program, inputs, parts)
            if captured is None:
                return run_eagerly(program, inputs)
            return captured(inputs)

    def clear(self) -> None:
        """Drops all graphs and frees their memory."""
        with self._lock:
            self._captured.clear()

    def _find(
        self, model: nn.Module, key: Hashable, program: Program, inputs: Sequence[Tensor | None], parts: int
    ) -> CapturedProgram | None:
        """Returns the graphs for this call, or None if the call is new or cannot be captured."""
        if key not in self._captured:
            self._captured[key] = None
            while len(self._captured) > MAX_KNOWN_CALLS:
                self._captured.popitem(last=False)
            return None
        self._captured.move_to_end(key)
        captured = self._captured[key]
        if captured is not None and not captured.layout.is_current():
            self._captured[key] = captured = None
        layout = ModelLayout(model) if captured is None else captured.layout
        if layout.must_call_modules():
            return None
        if captured is None:
            self._make_room()
            try:
                captured = CapturedProgram(layout, program, inputs, parts)
            except RuntimeError as error:
                self.enabled = False
                warnings.warn(
                    f"{type(model).__name__} cannot be captured as CUDA graphs and runs without them, which is slower "
                    f"for small batches: {str(error).splitlines()[0]}",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return None
            self._captured[key] = captured
        return captured

    def _make_room(self) -> None:
        kept = [key for key, captured in self._captured.items() if captured is not None]
        for key in kept[: max(0, len(kept) - MAX_CACHED_GRAPHS + 1)]:
            del self._captured[key]


@dataclass
class Part:
    """A graph, its results, and its `done` flag, which is copied to the host after each replay."""

    graph: torch.cuda.CUDAGraph
    results: tuple[Tensor, ...]
    done: Tensor | None
    done_on_host: Tensor = field(default_factory=lambda: torch.empty((), dtype=torch.bool, pin_memory=True))
    event: torch.cuda.Event = field(default_factory=torch.cuda.Event)

    def replay(self) -> None:
        self.graph.replay()
        if self.done is not None:
            self.done_on_host.copy_(self.done, non_blocking=True)
            self.event.record()

    def is_done(self) -> bool:
        """Waits for the device and returns its flag."""
        if self.done is None:
            return False
        self.event.synchronize()
        return bool(self.done_on_host)


class CapturedProgram:
    """A program as graphs, with its own input tensors.

    Raises:
        RuntimeError: the program cannot be captured.
    """

    def __init__(self, layout: ModelLayout, program: Program, inputs: Sequence[Tensor | None], parts: int) -> None:
        self.layout = layout
        self._inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        # Run every part once, even past `done`: kernels must be compiled, tuned and loaded before capture.
        for _ in program(*self._inputs):
            pass
        torch.cuda.synchronize()
        self._parts: list[Part] = []
        self._finished: torch.cuda.Event | None = None
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):
            running = program(*self._inputs)
            for _ in range(parts):
                graph = torch.cuda.CUDAGraph()
                # Other threads may allocate and copy meanwhile.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    done, results = next(running)
                finally:
                    graph.capture_end()
                self._parts.append(Part(graph, results, done))
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        if self._finished is not None:  # the last call may have used another stream
            torch.cuda.current_stream().wait_event(self._finished)
        for own, given in zip(self._inputs, inputs, strict=True):
            if own is not None:
                own.copy_(given, non_blocking=True)
        results = self._replay()
        copies = tuple(result.clone() for result in results)
        self._finished = torch.cuda.Event()
        self._finished.record()
        return copies

    def _replay(self) -> tuple[Tensor, ...]:
        for index, part in enumerate(self._parts):
            part.replay()
            if index >= PARTS_AHEAD and self._parts[index - PARTS_AHEAD].is_done():
                break
        return part.results


class ModelLayout:
    """A model's modules and the memory layout of its parameters and buffers. Their values do not matter: graphs read
    them at each replay."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        owns = [vars(module) for module in self._modules]
        self._hooks = [own[hooks] for own in owns for hooks in _HOOKS]
        self._children = [
            (module._modules, tuple(module._modules.values())) for module in self._modules if module._modules
        ]
        self._tensors = [
            (tensors, name, _layout(tensor))
            for module in self._modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]

    def must_call_modules(self) -> bool:
        """Whether calling a module runs code that a graph would skip: a hook, a `forward` on the instance, a class from
        another package, or a tensor subclass."""
        return (
            _has_any_global_hook()
            or any(self._hooks)
            or any("forward" in vars(module) for module in self._modules)
            or not all(map(_is_known, set(map(type, self._modules[1:]))))
            or any(layout is None for _, _, layout in self._tensors)
        )

    def is_current(self) -> bool:
        """Whether the modules are the same and every tensor has kept its address and layout."""
        # Modules compare by identity, so these tuples do too.
        return all(tuple(children.values()) == known for children, known in self._children) and all(
            (tensor := tensors.get(name)) is not None and _layout(tensor) == layout
            for tensors, name, layout in self._tensors
        )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_known(kind: type[nn.Module]) -> bool:
    """Whether the `forward` of this class comes from PyTorch's layers or from this package."""
    return kind.forward.__module__.startswith(("torch.nn.modules.", "mplug2_fast."))


def _layout(tensor: Tensor) -> tuple[Any, ...] | None:
    """Address and layout, or None for a `Tensor` subclass, which may hold several tensors."""
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if type(tensor) in TENSORS else None


def run_eagerly(program: Program, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Runs a program operation by operation until it is done, and returns its results."""
    found: tuple[Tensor, ...] = ()
    for index, (done, results) in enumerate(program(*inputs), 1):
        found = results
        if done is not None and index % EAGER_PARTS.get(done.device.type, DEFAULT_EAGER_PARTS) == 0 and bool(done):
            break
    return found


def can_capture(model: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether replaying graphs gives this caller the same as running the operations one by one."""
    if any(tensor.device.type != "cuda" or tensor.requires_grad for tensor in tensors):
        return False
    return not (
        torch.is_grad_enabled()
        or model.training
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cuda")
        or torch.cuda.is_current_stream_capturing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    )
