"""The tests that every operator must pass, from its specification.

A test module derives a class from `OpSuite`, or from `DifferentiableOpSuite`, and names its operator:

    class TestSpecification(DifferentiableOpSuite):
        operator = ops.layer_norm
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mplug2_fast import ops
from mplug2_fast.ops.runtime import cpu, cuda, packages, triton
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.spec import Sizes
from tests.tolerance import assert_close_enough, relative

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The native kernels of every instruction set that this processor has.
ALL_ISAS = (
    [isa for isa in cpu.module().Isa.__members__.values() if cpu.module().is_supported(isa)] if cpu.available() else []
)
ISAS = [isa for isa in ALL_ISAS if isa.name != "avx512_vnni"]  # most kernels are those of avx512

# Where the Triton kernels run: on a GPU if there is one, on the CPU in a process where Triton interprets them.
CUDA = torch.cuda.is_available()
TRITON_DEVICE = "cuda" if CUDA else "cpu" if triton.INTERPRETED else None
TRITON_DTYPES = DTYPES if CUDA else (torch.float32, torch.float16) if triton.INTERPRETED else ()

# Backends of GPUs that are free to refuse, and which of them can be tried here.
CHOOSY = (*packages.BACKENDS, "cuda") if CUDA else ()
CUDA_KERNELS = CUDA and cuda.error() is None and torch.cuda.get_device_capability() == cuda.CAPABILITY


def device(backend: str | None) -> str:
    if backend in CHOOSY:
        return "cuda"
    return TRITON_DEVICE if backend == "triton" else "cpu"


def served_by(backend: str | None) -> AbstractContextManager[None]:
    return nullcontext() if backend is None else ops.use_backend(backend)


def on_cpu(op: Op) -> str | None:
    """The backend that must be forced for a CPU; None if one serves it anyway."""
    return None if "cpu" in op.spec.devices else "torch"


def label(value: Any) -> str:
    """A short name of sizes, dtypes and backends for the names of tests."""
    if isinstance(value, dict):
        return ",".join(f"{name}={size}" for name, size in value.items()).replace(" ", "")
    return str(value).removeprefix("torch.")


def spread(value: Tensor) -> Tensor:
    """The same values, with others between them."""
    return torch.stack([value, torch.full_like(value, 3)], dim=-1)[..., 0]


def reverse(value: Tensor) -> Tensor:
    """The same values with axes stored in reverse; of a vector, its first value everywhere with stride zero."""
    if value.dim() < 2:  # larger tensors must keep their values, which operators tell apart
        return value[:1].expand(value.shape)
    axes = tuple(reversed(range(value.dim())))
    return value.permute(axes).contiguous().permute(axes)


class OpSuite:
    operator: ClassVar[Callable[..., Any]]
    isas: ClassVar[list[Any]] = ISAS

    @property
    def op(self) -> Op:
        return type(self).operator.op  # type: ignore[attr-defined]

    @property
    def on_cpu(self) -> str | None:
        """The backend that must be forced on a CPU, or None."""
        return on_cpu(self.op)

    def test_names_and_arguments_agree(self):
        made = self.op.spec.inputs(self.op.spec.edge_cases[0])
        assert list(made) == self.op.names
        assert set(self.op.spec.differentiable) <= made.keys()
        assert set(self.op.spec.axes) - {"result"} <= made.keys()

    def test_forward(self, sizes: Sizes, dtype: torch.dtype, backend: str, request, monkeypatch):
        """Against eager code and float64; on the CPU with every instruction set."""
        self._prepare(backend, request)
        given = self.op.spec.inputs(sizes, dtype, device(backend))
        expected = self.op.spec.reference(**given)
        exact = self.op.spec.reference(**given, upcast=True)
        for isa in self.isas if backend == "cpu" else [None]:
            if isa is not None:
                monkeypatch.setattr(cpu, "isa", lambda isa=isa: isa)
            given = self.op.spec.inputs(sizes, dtype, device(backend))
            with torch.no_grad(), ops.use_backend(backend):
                actual = self.op(*given.values())
            for ours, eager, true in zip(*map(as_tuple, (actual, expected, exact)), strict=True):
                assert ours.is_contiguous()
                assert ours.dtype == eager.dtype
                if self.op.spec.exact:
                    assert torch.equal(ours, eager), isa
                else:
                    assert_close_enough(ours, eager, true, self.op.spec.floor(given, dtype), f"forward, {isa}")

    def test_any_strides_of_any_argument(self, anywhere: str | None):
        """Results do not depend on the layout of the arguments: every second element, reversed axes, stride zero.

        Half of the sizes are tried, and one where Triton interprets. Arguments change one by one, or, where that takes
        too long, every third of them at once.
        """
        for sizes in self.op.spec.edge_cases[::2] if anywhere is None or CUDA else self.op.spec.edge_cases[3:4]:
            given = self.op.spec.inputs(sizes, device=device(anywhere))
            names = [name for name, value in given.items() if isinstance(value, Tensor) and value.numel()]
            count = len(names) if anywhere is None or CUDA else 3
            with served_by(anywhere or self.on_cpu):
                same = self.op(*given.values())
                for group, layout in itertools.product((names[i::count] for i in range(count)), (spread, reverse)):
                    changed = {name: layout(given[name]) for name in group}
                    actual = self.op(*{**given, **changed}.values())
                    if all(torch.equal(value, given[name]) for name, value in changed.items()):
                        expected = same
                    else:
                        values = {name: value.contiguous() for name, value in changed.items()}
                        expected = self.op(*{**given, **values}.values())
                    for one, other in zip(as_tuple(actual), as_tuple(expected), strict=True):
                        if rounding := self.op.spec.rounding(self.op.arguments(**given)):
                            assert relative(one, other) <= rounding, group
                            continue
                        torch.testing.assert_close(one, other, equal_nan=True, msg=lambda m, n=group: f"{n}: {m}")

    def test_stays_in_a_compiled_graph(self, compiled: str | None):
        given = self.op.spec.inputs(self.op.spec.edge_cases[1], device=device(compiled))
        graphs = []
        torch._dynamo.reset()  # every operator goes through the same line, and there is a limit to recompiling it

        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        function = torch.compile(lambda *a: self.op(*a), fullgraph=True, backend=backend)
        with torch.no_grad(), served_by(compiled or self.on_cpu):
            actual, expected = function(*given.values()), self.op(*given.values())
        called = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
        assert getattr(torch.ops.mplug2_fast, self.op.name).default in called
        for one, other in zip(as_tuple(actual), as_tuple(expected), strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)

    def test_opcheck(self, opcheck_dtype: torch.dtype, opcheck_backend: str | None):
        """Schema, fake implementation, autograd registration, and ahead-of-time compilation with gradients.

        Compilation does not depend on where the kernel runs, and is left out under Triton's interpreter. The schema's
        test cannot compare e4m3 numbers.
        """
        interpreted = opcheck_backend == "triton" and not CUDA
        brief = interpreted or opcheck_dtype != torch.float32
        tests = ["test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"]
        tests = tests[:2] if interpreted else tests
        for sizes in self.op.spec.edge_cases[: 1 if brief else 2]:
            given = self.op.spec.inputs(sizes, opcheck_dtype, device(opcheck_backend))
            for name in self.op.spec.differentiable:
                if isinstance(given[name], Tensor):
                    given[name].requires_grad_()
            if any(isinstance(v, Tensor) and v.dtype == torch.float8_e4m3fn for v in given.values()):
                tests = [test for test in tests if test != "test_schema"]
            with served_by(opcheck_backend or self.on_cpu):
                for operator in {self.op.torch_op, self.op.training_op}:
                    torch.library.opcheck(operator, tuple(given.values()), test_utils=tuple(tests))

    def test_never_falls_back(self, native_module):
        for sizes in self.op.spec.edge_cases:
            for dtype in cpu.DTYPES:
                with ops.strict(), torch.no_grad():
                    self.op(*self.op.spec.inputs(sizes, dtype).values())

    def _prepare(self, backend: str, request: Any) -> None:
        if backend == "cpu":
            request.getfixturevalue("native_module")


class DifferentiableOpSuite(OpSuite):
    def test_gradients(self, sizes: Sizes, dtype: torch.dtype, gradient_backend: str, request):
        """Against float64: of the torch formula, and of the native kernel, where the formula is computed again."""
        self._prepare(gradient_backend, request)
        given = self.op.spec.inputs(sizes, dtype, device(gradient_backend))
        exact = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in given.items()}

        def forced(*arguments: Any) -> Any:
            with ops.use_backend(gradient_backend):
                return self.op(*arguments)

        if gradient_backend == "triton":
            assert self.op.choice.own_backward(self.op.arguments(**given)) is self.op.backends["triton"]
        true = self._gradients(lambda *a: self.op.spec.reference(*a), exact)
        eager = self._gradients(lambda *a: self.op.spec.reference(*a), given)
        ours = self._gradients(forced, given)
        for name, gradient in true.items():
            floor = self.op.spec.floor(given, dtype)
            assert_close_enough(ours[name], eager[name], gradient, floor, f"gradient of {name}")

    def _gradients(self, function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Tensor]:
        """Of a fixed random projection of the floating-point results."""
        leaves = dict(given)
        for name in self.op.spec.differentiable:
            if isinstance(given[name], Tensor):
                leaves[name] = given[name].detach().clone().requires_grad_()
        results = [out for out in as_tuple(function(*leaves.values())) if out.requires_grad]
        generator = torch.Generator().manual_seed(5)
        directions = [
            torch.randn(out.shape, generator=generator).to(out.device, given_dtype(given)).to(out.dtype)
            for out in results
        ]
        torch.autograd.backward(results, directions)
        return {name: leaves[name].grad for name in self.op.spec.differentiable if isinstance(leaves[name], Tensor)}


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def given_dtype(given: dict[str, Any]) -> torch.dtype:
    return next(v.dtype for v in given.values() if isinstance(v, Tensor) and v.is_floating_point())


def with_sizes(op: Op, ways: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Every way with all edge cases; one that is free to refuse, with those that it serves.

    Without a GPU, PyTorch and the interpreted kernels get every third of the sizes in narrow types.
    """
    every_third = op.spec.edge_cases[::3]

    def served(sizes: Sizes, dtype: torch.dtype, backend: str, *_: Any) -> bool:
        if not CUDA and backend in ("torch", "triton") and dtype != torch.float32:
            return sizes in every_third
        if backend == "triton" and (sizes.get("int8") or sizes.get("int8_memory")):
            return False
        if backend not in CHOOSY:
            return True
        given = op.spec.inputs(sizes, dtype, device(backend))
        return not op.choice.reasons(op.backends[backend], op.arguments(**given))

    return [(sizes, *way) for sizes in op.spec.edge_cases for way in ways if served(sizes, *way)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Called by conftest.py: parametrises tests by the operator's specification."""
    operator = getattr(metafunc.cls, "operator", None)
    if operator is None:
        return
    names, op = metafunc.fixturenames, operator.op
    has_triton = "triton" in op.backends and TRITON_DEVICE is not None
    on_native = [(dtype, "cpu") for dtype in cpu.DTYPES if "cpu" in op.backends]
    on_triton = [(dtype, "triton") for dtype in TRITON_DTYPES if has_triton]
    choosy = [name for name in CHOOSY if name in op.backends and (name != "cuda" or CUDA_KERNELS)]
    on_others = [(dtype, name) for name in choosy for dtype in DTYPES]
    others = [*((dtype, "torch") for dtype in DTYPES), *on_triton, *on_others]
    if "backend" in names:
        metafunc.parametrize(("sizes", "dtype", "backend"), with_sizes(op, on_native + others), ids=label)
    if "gradient_backend" in names:
        ways = [way for way in on_native + others if way[1] != "triton" or op.backends["triton"].backward is not None]
        metafunc.parametrize(("sizes", "dtype", "gradient_backend"), with_sizes(op, ways), ids=label)
    if "anywhere" in names:
        metafunc.parametrize("anywhere", [None, "triton"] if has_triton else [None], ids=label)
    if "compiled" in names:
        metafunc.parametrize("compiled", [None, "triton"] if has_triton and CUDA else [None], ids=label)
    if "opcheck_dtype" in names:
        ways = [(dtype, None) for dtype in cpu.DTYPES] + on_triton[:1]
        metafunc.parametrize(("opcheck_dtype", "opcheck_backend"), ways, ids=label)
