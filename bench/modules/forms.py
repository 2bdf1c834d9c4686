"""A module in several implementations, over the same seeded weights and inputs, forward and backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import OURS, Agreement, Call, Case, agreement
from bench.peer import TUNED
from bench.row import Key
from bench.weights import allocate
from mplug2_fast import MPlug2Config
from mplug2_fast.ops import Explanation
from mplug2_fast.ops.runtime.spec import NOISE_FLOOR, normal

BACKENDS = {"cpu": "native, oneDNN", "triton": "Triton, PyTorch", "torch": "PyTorch"}


class Form(nn.Module):
    """One implementation: `run(model, *inputs)`.

    Args:
        model: may be partly on the meta device.
        weights: official name -> view into the parameters that have memory.
    """

    def __init__(self, model: nn.Module, weights: dict[str, Tensor], run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.weights, self.run = model, weights, run

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self.model, *inputs)

    @property
    def allocated(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if not parameter.is_meta]


Build = Callable[[MPlug2Config, str, torch.dtype], Form]
"""From the configuration, the device and the dtype."""


def part_of(
    kind: type[nn.Module],
    parts: Callable[[MPlug2Config], Sequence[str]],
    run: Callable[..., Tensor],
    *,
    pack: bool = False,
) -> Build:
    """Builds a form from parts of a model, which are allocated; `pack` packs their weights."""

    def build(config: MPlug2Config, device: str, dtype: torch.dtype) -> Form:
        model = kind(config, device="meta", dtype=dtype)
        weights = allocate(model, device, *parts(config))
        return Form(model.pack() if pack else model, weights, run)

    return build


@dataclass(frozen=True)
class Work:
    """What a module's file says about it.

    Attributes:
        shapes: of the inputs. The first is also the result's.
        ours: as the model runs it without gradients, weights packed. reference: the official module. peer: eager.
        flop: needed by the forward pass. With gradients, constants of the model are computed too.
        explain: from our model and the inputs: which backend serves the main operator.
    """

    shapes: Callable[[MPlug2Config], Sequence[tuple[int, ...]]]
    ours: Build
    reference: Build
    peer: Build
    flop: Callable[[MPlug2Config, bool], int]
    explain: Callable[..., Explanation]


def config_of(key: Key) -> MPlug2Config:
    """Sizes begin with the preset."""
    return MPlug2Config.preset(key.sizes.split(",")[0])


def build(work: Work, key: Key, *, compile: bool) -> Case:
    config, dtype = config_of(key), getattr(torch, key.dtype)
    with_gradients = key.direction != "forward"
    generator = torch.Generator().manual_seed(0)
    inputs = [normal(generator, *shape).to(key.device, dtype) for shape in work.shapes(config)]
    grad = normal(generator, *inputs[0].shape).to(key.device, dtype)

    @functools.cache
    def form(way: str) -> Form:
        kind = {OURS: work.ours, "reference": work.reference}.get(way, work.peer)
        made = kind(config, key.device, torch.float32 if way == "reference" else dtype).eval()
        for parameter in made.allocated:
            parameter.requires_grad_(with_gradients)
        return made

    @functools.cache
    def call(way: str) -> Call:
        made = form(way)
        wide = torch.float32 if way == "reference" else dtype
        given = [x.to(wide).requires_grad_(with_gradients) for x in (x.detach() for x in inputs)]
        if way == "compiled":
            tuned: dict[str, Any] = {"options": TUNED} if key.device.startswith("cuda") else {}
            made.run = torch.compile(made.run, dynamic=False, fullgraph=True, **tuned)
        ready = call_of(made, key.direction, given, grad.to(wide))
        if way == "compiled":
            with compiling(freeze=not with_gradients and key.device == "cpu"):
                ready()
        return ready

    def agree() -> Agreement:
        def results(way: str) -> list[list[Tensor]]:
            return compared(call(way), form(way), len(inputs))

        exact = results("reference")
        scales = [norm_of(group) for group in exact]

        def scaled(groups: list[list[Tensor]]) -> list[Tensor]:
            return [t.double() / scale for group, scale in zip(groups, scales, strict=True) for t in group]

        others = {"compiled": scaled(results("compiled"))} if compile else {}
        ours, eager = results(OURS), results("eager")
        return agreement(scaled(ours), scaled(exact), scaled(eager), NOISE_FLOOR[dtype], others)

    with torch.set_grad_enabled(with_gradients):
        probe = [x.detach().requires_grad_(with_gradients) for x in inputs]
        served = work.explain(form(OURS).model, *probe).chosen or ""
    weights, moved = bytes_of(form(OURS).weights.values()), bytes_of(inputs)
    names = [OURS, "reference", "eager", *(["compiled"] if compile else [])]
    passes = {"forward": 1, "backward": 2, "both": 3}[key.direction]
    return Case(
        key=key,
        ways={way: functools.partial(lambda way: [call(way)], way) for way in names},
        flop=passes * work.flop(config, with_gradients),
        # With gradients: weights and inputs and the gradients of both, the result's gradient, and forward the result.
        bytes=(weights + moved) * (1 + with_gradients) + bytes_of([grad]) * (2 if key.direction == "both" else 1),
        agreement=agree,
        backend=BACKENDS.get(served, served),
    )


def call_of(form: Form, direction: str, inputs: list[Tensor], grad: Tensor) -> Call:
    """Forward alone returns the result. With a backward pass it is the gradients of inputs and parameters, in order."""
    leaves = [*inputs, *form.allocated]

    def forward() -> Tensor:
        with torch.no_grad():
            return form(*inputs)

    def recorded() -> tuple[Tensor]:
        with torch.enable_grad():
            return (form(*inputs),)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad)

    if direction == "forward":
        return Call(forward)
    return Call(backward, recorded) if direction == "backward" else Call(lambda: backward(*recorded()))


def compared(call: Call, form: Form, inputs: int) -> list[list[Tensor]]:
    """What all implementations share: the result, or the gradients of the inputs and those of weights by official
    name."""
    found = call()
    if isinstance(found, Tensor):
        return [[found]]
    kept = {
        parameter.untyped_storage().data_ptr(): gradient.contiguous()
        for parameter, gradient in zip(form.allocated, found[inputs:], strict=True)
    }
    weights = []
    for _, view in sorted(form.weights.items()):
        gradient = kept[view.untyped_storage().data_ptr()]
        weights.append(gradient.as_strided(view.shape, view.stride(), view.storage_offset()))
    return [list(found[:inputs]), weights]


@contextmanager
def compiling(*, freeze: bool, graphs: int = 1) -> Iterator[None]:
    """Surrounds the first call of what is compiled.

    Args:
        freeze: the weights become constants of the graph, packed for the CPU.
        graphs: how many the same code needs.
    """
    torch._dynamo.reset()  # drops other graphs of the same code
    with torch._inductor.config.patch(freezing=freeze), torch._dynamo.config.patch(recompile_limit=1 + graphs):
        yield


def norm_of(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
