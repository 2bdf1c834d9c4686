"""Every operator on a GPU, as programs use it there: streams, graphs, compilers, devices, memory beyond 32 bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mplug2_fast import ops
from mplug2_fast.ops.runtime.spec import Sizes

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
NAMES = [name for name in ops.OPERATORS if name != "linear_fp8" or HAS_FP8]
DIFFERENTIABLE = [name for name, function in ops.OPERATORS.items() if function.op.spec.differentiable]
DEVICES = [f"cuda:{index}" for index in range(max(1, min(2, torch.cuda.device_count())))]
CYCLES = 50_000_000
"""Cycles for which the device sleeps: tens of milliseconds, while the host queues further work."""


def sizes_of(name: str) -> Sizes:
    """Some sizes that are neither empty nor simple."""
    spec = ops.OPERATORS[name].op.spec
    return next(
        sizes
        for sizes in spec.edge_cases[1:]
        if all(value.numel() > 2 for value in spec.inputs(sizes).values() if isinstance(value, Tensor))
    )


def inputs(name: str, dtype: torch.dtype, device: str = "cuda", seed: int = 0) -> dict[str, Any]:
    return ops.OPERATORS[name].op.spec.inputs(sizes_of(name), dtype, device, seed)


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def assert_same(actual: Any, expected: Any) -> None:
    for one, other in zip(as_tuple(actual), as_tuple(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def assert_near(actual: Any, expected: Any, bound: float, what: str = "") -> None:
    """Whole numbers the same, the others within a bound relative to their norm."""
    for one, other in zip(as_tuple(actual), as_tuple(expected), strict=True):
        if other.is_floating_point():
            error, norm = (one.double() - other.double()).norm(), other.double().norm()
            assert error <= bound * norm, f"{what}: {error:.2e} of {norm:.2e}"
        else:
            assert torch.equal(one, other), what


def write(target: dict[str, Any], source: dict[str, Any]) -> None:
    for name, value in target.items():
        if isinstance(value, Tensor):
            value.copy_(source[name])


def empties(given: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.zeros_like(value) if isinstance(value, Tensor) else value for name, value in given.items()}


def gradients(function: Callable[..., Any], name: str, given: dict[str, Any]) -> list[Tensor | None]:
    """Of a fixed random projection of the results."""
    leaves = dict(given)
    wanted = [n for n in ops.OPERATORS[name].op.spec.differentiable if isinstance(given[n], Tensor)]
    for n in wanted:
        leaves[n] = given[n].detach().clone().requires_grad_()
    outs = [out for out in as_tuple(function(*leaves.values())) if out.requires_grad]
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outs]
    torch.autograd.backward(outs, directions)
    return [leaves[n].grad for n in wanted]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_dispatch_chooses_is_right(name, dtype):
    """Against the same operator on the CPU, in float64."""
    given = inputs(name, dtype)
    spec = ops.OPERATORS[name].op.spec
    on_cpu = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in given.items()}
    actual, exact = ops.OPERATORS[name].op(*given.values()), spec.reference(**on_cpu, upcast=True)
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert_near(tuple(out.cpu() for out in as_tuple(actual)), exact, bound)


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs(name):
    given = inputs(name, torch.bfloat16)
    op = ops.OPERATORS[name].op
    expected = op(*given.values())
    for n, value in given.items():
        if not isinstance(value, Tensor):
            continue
        axes = list(reversed(range(value.dim())))
        apart = torch.stack([value, torch.full_like(value, 3)], dim=-1)[..., 0]
        for layout in (apart, value.permute(axes).contiguous().permute(axes)):
            assert_near(op(*{**given, n: layout}.values()), expected, 1e-2, n)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_every_time(name):
    given = inputs(name, torch.bfloat16)
    op = ops.OPERATORS[name].op
    assert_same(op(*given.values()), op(*given.values()))
    if name in DIFFERENTIABLE:
        for one, other in zip(gradients(op, name, given), gradients(op, name, given), strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_another_stream(name):
    """The inputs exist only when their stream reaches the call."""
    given = inputs(name, torch.float16)
    op = ops.OPERATORS[name].op
    expected, late, stream = op(*given.values()), empties(given), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        write(late, given)
        actual = op(*late.values())
    stream.synchronize()
    assert_same(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_captured_in_a_graph(name):
    op = ops.OPERATORS[name].op
    first, second = inputs(name, torch.bfloat16), inputs(name, torch.bfloat16, seed=1)
    static, stream = empties(first), torch.cuda.Stream()
    write(static, first)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(2):
            op(*static.values())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = op(*static.values())
    for given in (first, second):
        write(static, given)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, op(*given.values()))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_forward(name):
    given = inputs(name, torch.bfloat16)
    op = ops.OPERATORS[name].op
    torch._dynamo.reset()
    compiled = torch.compile(lambda *values: op(*values), fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(*given.values()), op(*given.values()))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiled_backward(name):
    given = inputs(name, torch.bfloat16)
    op = ops.OPERATORS[name].op
    torch._dynamo.reset()
    compiled = torch.compile(lambda *values: op(*values), fullgraph=True)
    for one, other in zip(gradients(compiled, name, given), gradients(op, name, given), strict=True):
        assert_near(one, other, 1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_a_device_that_is_not_the_current_one(name, device):
    """The current device stays the first; a single GPU is both."""
    op = ops.OPERATORS[name].op
    results = op(*inputs(name, torch.float32, device).values())
    assert torch.cuda.current_device() == 0
    for one, other in zip(as_tuple(results), as_tuple(op(*inputs(name, torch.float32).values())), strict=True):
        assert one.device == torch.device(device)
        assert_same(one.cpu(), other.cpu())


FAR = 2**31 + 2**12


def test_layer_norm_beyond_32_bits():
    rows, channels = FAR // 1024, 1024
    x = torch.empty(rows, channels, dtype=torch.float16, device="cuda").fill_(1)
    x[-3:] = torch.randn(3, channels, device="cuda")
    assert_same(ops.layer_norm(x)[-3:], ops.layer_norm(x[-3:].clone()))


def test_beam_step_beyond_32_bits():
    buffer = torch.empty(FAR + 400, dtype=torch.float16, device="cuda")
    logits = buffer.as_strided((2, 2, 200), (FAR, 200, 1))
    logits.copy_(torch.randn(2, 2, 200, device="cuda"))
    cumulative = torch.zeros(2, 2, device="cuda")
    far, near = (
        ops.beam_step(values, cumulative, step=3, min_length=2, end_token_id=5) for values in (logits, logits.clone())
    )
    assert_same(far, near)


def test_preprocess_frames_beyond_32_bits():
    buffer = torch.empty(FAR + 4000, dtype=torch.uint8, device="cuda")
    frames = buffer.as_strided((2, 30, 40, 3), (FAR, 120, 3, 1))
    frames.copy_(torch.randint(0, 256, (2, 30, 40, 3), dtype=torch.uint8))
    for patch_size in (None, 8):
        far, near = (
            ops.preprocess_frames(values, 16, torch.bfloat16, patch_size=patch_size)
            for values in (frames, frames.clone())
        )
        assert_same(far, near)
