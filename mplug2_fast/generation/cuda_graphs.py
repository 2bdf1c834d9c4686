"""How the model's inference runs: operation by operation, or, on a GPU, as CUDA graphs.

A program is a function of tensors that yields after each part of its work. A part is what the host launches at once: on
a GPU it becomes a graph, whose replay costs the host some microseconds where launching its kernels one by one takes
longer than the kernels do. Between parts the host may look at what the device found, and stop.

A program that is called a second time with tensors of the same shapes is captured, all of it; from then on it is
replayed on copies of its inputs. Graphs read weights at their addresses, so that writing to a weight counts at once;
what is computed from weights alone, such as the latents before they meet a video, is part of the graph. Where a weight
has moved or has another layout, or a module was exchanged, the program is captured anew. Nothing is captured where
somebody wants to see every operation, as with hooks, modules of other packages, gradients or modes of PyTorch's
dispatcher.
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
from mplug2_fast.ops.runtime import dispatch

Program = Callable[..., Iterator[tuple[Tensor | None, tuple[Tensor, ...]]]]
"""Yields (one bool on the device that ends it, or None; the results so far)."""

MOST = 8
"""Programs that are kept as graphs, those used last. Each holds its inputs and results."""
REMEMBERED = 64
"""Calls that were seen once."""
AHEAD = 2
"""Parts that are launched before the host looks whether the program has ended: enough for the device not to wait."""
EAGER_PARTS = {"cpu": 1}
"""The same without graphs: parts between two looks."""
DEFAULT_EAGER_PARTS = 4


class Programs:
    """Runs the programs of one model. A copy of it, as of a model that is copied or pickled, starts without graphs."""

    def __init__(self) -> None:
        self.graphs = True
        self._captured: OrderedDict[Hashable, Captured | None] = OrderedDict()
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: Any) -> Programs:
        copied = Programs()
        copied.graphs = self.graphs
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return Programs, (), {"graphs": self.graphs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.graphs = state["graphs"]

    def run(
        self, model: nn.Module, name: Hashable, program: Program, inputs: Sequence[Tensor | None], parts: int
    ) -> tuple[Tensor, ...]:
        """The results of `program(*inputs)`, which no later call overwrites.

        Args:
            model: whose weights the program reads.
            name: of the program, with all that it depends on beside the tensors.
            parts: how often it yields, if nothing ends it.
        """
        tensors = [tensor for tensor in inputs if tensor is not None]
        if not self.graphs or not tensors or not capturable(model, tensors):
            return eagerly(program, inputs)
        kinds = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in inputs)
        # Tensors of inference mode may not be written outside of it.
        modes = (dispatch.in_force(), torch.backends.cuda.matmul.allow_tf32, torch.is_inference_mode_enabled())
        key = (name, kinds, *modes)
        with self._lock, torch.cuda.device(tensors[0].device):
            captured = self._find(model, key, program, inputs, parts)
            if captured is None:
                return eagerly(program, inputs)
            return captured(inputs)

    def clear(self) -> None:
        """Drops all graphs, and the memory that they hold."""
        with self._lock:
            self._captured.clear()

    def _find(
        self, model: nn.Module, key: Hashable, program: Program, inputs: Sequence[Tensor | None], parts: int
    ) -> Captured | None:
        """The graphs for this call; None where it is seen for the first time, or cannot be captured."""
        if key not in self._captured:
            self._captured[key] = None
            while len(self._captured) > REMEMBERED:
                self._captured.popitem(last=False)
            return None
        self._captured.move_to_end(key)
        captured = self._captured[key]
        if captured is not None and not captured.weights.unmoved():
            self._captured[key] = captured = None
        weights = Weights(model) if captured is None else captured.weights
        if weights.watched():
            return None
        if captured is None:
            self._make_room()
            try:
                captured = Captured(weights, program, inputs, parts)
            except RuntimeError as error:
                self.graphs = False
                warnings.warn(
                    f"{type(model).__name__} runs without CUDA graphs, which costs time at small batches, for it "
                    f"cannot be captured: {str(error).splitlines()[0]}",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return None
            self._captured[key] = captured
        return captured

    def _make_room(self) -> None:
        kept = [key for key, captured in self._captured.items() if captured is not None]
        for key in kept[: max(0, len(kept) - MOST + 1)]:
            del self._captured[key]


@dataclass
class Part:
    """A graph and what it leaves: results, and whether the program has ended, which is then copied to the host."""

    graph: torch.cuda.CUDAGraph
    results: tuple[Tensor, ...]
    ended: Tensor | None
    told: Tensor = field(default_factory=lambda: torch.empty((), dtype=torch.bool, pin_memory=True))
    event: torch.cuda.Event = field(default_factory=torch.cuda.Event)

    def replay(self) -> None:
        self.graph.replay()
        if self.ended is not None:
            self.told.copy_(self.ended, non_blocking=True)
            self.event.record()

    def has_ended(self) -> bool:
        """Waits for the device."""
        if self.ended is None:
            return False
        self.event.synchronize()
        return bool(self.told)


class Captured:
    """A program as graphs, with copies of its inputs.

    Raises:
        RuntimeError: something in it cannot be captured.
    """

    def __init__(self, weights: Weights, program: Program, inputs: Sequence[Tensor | None], parts: int) -> None:
        self.weights = weights
        self._inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        # All of it once, beyond what ends it: kernels are compiled, tuned and loaded before they are captured.
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
                # Other threads may go on allocating and copying.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    ended, results = next(running)
                finally:
                    graph.capture_end()
                self._parts.append(Part(graph, results, ended))
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        if self._finished is not None:  # by another stream, perhaps
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
            if index >= AHEAD and self._parts[index - AHEAD].has_ended():
                break
        return part.results


class Weights:
    """Where a model's parameters and buffers are in memory and how they are laid out there, what its modules are, and
    whether their calls must be seen. Values do not count: graphs read them at each replay."""

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

    def watched(self) -> bool:
        """Whether somebody's code runs when a module is called, which a graph would leave out: hooks, a forward of an
        instance or of another package's class, tensors that are subclasses."""
        return (
            _has_any_global_hook()
            or any(self._hooks)
            or any("forward" in vars(module) for module in self._modules)
            or not all(map(_is_known, set(map(type, self._modules[1:]))))
            or any(layout is None for _, _, layout in self._tensors)
        )

    def unmoved(self) -> bool:
        # Tuples of modules are compared by identity, for that is how modules compare.
        return all(tuple(children.values()) == known for children, known in self._children) and all(
            (tensor := tensors.get(name)) is not None and _layout(tensor) == layout
            for tensors, name, layout in self._tensors
        )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_known(kind: type[nn.Module]) -> bool:
    """Whether the class computes by a forward of PyTorch's layers or of this package."""
    return kind.forward.__module__.startswith(("torch.nn.modules.", "mplug2_fast."))


def _layout(tensor: Tensor) -> tuple[Any, ...] | None:
    """None for a subclass of `Tensor`, which may have several tensors inside."""
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if type(tensor) in TENSORS else None


def eagerly(program: Program, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The results of a program, operation by operation, until it has ended."""
    found: tuple[Tensor, ...] = ()
    for index, (ended, results) in enumerate(program(*inputs), 1):
        found = results
        if ended is not None and index % EAGER_PARTS.get(ended.device.type, DEFAULT_EAGER_PARTS) == 0 and bool(ended):
            break
    return found


def capturable(model: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether graphs would do what the operations do, one by one, for whoever calls now."""
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
