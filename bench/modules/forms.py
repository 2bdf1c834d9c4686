"""A module in several implementations, over the same seeded weights and inputs, forward and backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.case import OURS, Agreement, Call, Case, agreement
from bench.peer import TUNED
from bench.row import Key
from mplug2_fast import MPlug2Config
from mplug2_fast.ops import Explanation
from mplug2_fast.ops.runtime.spec import NOISE_FLOOR, normal

BACKENDS = {"cpu": "native, oneDNN", "triton": "Triton, PyTorch", "torch": "PyTorch"}


@dataclass(frozen=True)
class Form:
    """One implementation.

    Attributes:
        module: called with the inputs; parts of it may be on the meta device.
        weights: released name -> view into its parameters.
    """

    module: nn.Module
    weights: dict[str, Tensor]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if not parameter.is_meta]


Build = Callable[[MPlug2Config, str, torch.dtype], Form]
"""From the configuration, the device and the dtype."""


@dataclass(frozen=True)
class Work:
    """What a module's file says of it.

    Attributes:
        shapes: of the inputs.
        ours: as the model runs it without gradients, weights packed. reference: the released module. peer: eager.
        flop: needed by the forward pass, with constants of the model computed beforehand, or, where gradients are asked
            for and they are no constants, not.
        explain: who serves the main operator of ours, from the module and the inputs.
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
    grad = normal(generator, *inputs[0].shape).to(key.device, dtype)  # every module returns its first input's shape

    @functools.cache
    def form(way: str) -> Form:
        kind = {OURS: work.ours, "reference": work.reference}.get(way, work.peer)
        made = kind(config, key.device, torch.float32 if way == "reference" else dtype)
        made.module.eval()
        for parameter in made.parameters:
            parameter.requires_grad_(with_gradients)
        return made

    @functools.cache
    def call(way: str) -> Call:
        made = form(way)
        wide = torch.float32 if way == "reference" else dtype
        given = [x.to(wide).requires_grad_(with_gradients) for x in (x.detach() for x in inputs)]
        if way == "compiled":
            static = {"dynamic": False, "fullgraph": True}
            tuned = {"options": TUNED} if key.device.startswith("cuda") else {}
            made.module.forward = torch.compile(made.module.forward, **static, **tuned)
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
        served = work.explain(form(OURS).module, *probe).chosen or ""
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
    """Forward alone returns the result; with a backward, the gradients of the inputs and parameters, in order."""
    leaves = [*inputs, *form.parameters]

    def forward() -> Tensor:
        with torch.no_grad():
            return form.module(*inputs)

    def recorded() -> tuple[Tensor]:
        with torch.enable_grad():
            return (form.module(*inputs),)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad)

    if direction == "forward":
        return Call(forward)
    return Call(backward, recorded) if direction == "backward" else Call(lambda: backward(*recorded()))


def compared(call: Call, form: Form, inputs: int) -> list[list[Tensor]]:
    """What implementations have in common: the result; or the gradients of inputs, and those of weights by released
    name."""
    found = call()
    if isinstance(found, Tensor):
        return [[found]]
    kept = {
        parameter.untyped_storage().data_ptr(): gradient.contiguous()
        for parameter, gradient in zip(form.parameters, found[inputs:], strict=True)
    }
    weights = []
    for _, view in sorted(form.weights.items()):
        gradient = kept[view.untyped_storage().data_ptr()]
        weights.append(gradient.as_strided(view.shape, view.stride(), view.storage_offset()))
    return [list(found[:inputs]), weights]


@contextmanager
def compiling(*, freeze: bool, graphs: int = 1) -> Iterator[None]:
    """For the first call of what is compiled.

    Args:
        freeze: the weights become constants of the graph, packed for the CPU. graphs: of the same code.
    """
    torch._dynamo.reset()  # of other graphs of the same code
    with torch._inductor.config.patch(freezing=freeze), torch._dynamo.config.patch(recompile_limit=1 + graphs):
        yield


def norm_of(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
