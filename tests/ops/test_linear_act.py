import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.ops.linear_act import EAGER, SPEC, quick_gelu
from mplug2_fast.ops.runtime import triton
from tests.ops.suite import TRITON_DEVICE, DifferentiableOpSuite


class TestSpecification(DifferentiableOpSuite):
    operator = ops.linear_act


@pytest.mark.parametrize("rows", [3, 80])
def test_strided_weight(rows):
    x, weight = torch.randn(rows, 10, 8)[:, 1:9:2, :], torch.randn(16, 5)[::2].t()
    torch.testing.assert_close(ops.linear_act(x, weight), x @ weight.t())


def test_quick_gelu():
    assert quick_gelu(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.0, 1 / (1 + 2.718281828**-1.702)])


def test_autocast():
    x, weight, bias = torch.randn(80, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True), torch.randn(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.linear_act(x, weight, bias, "gelu")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((3, 4), (5, 6), None), {}, "in_features"),
        (((3, 4), (5, 4), (4,)), {}, r"bias must have shape \(5,\)"),
        (((3, 4), (5, 4), None), {"activation": "relu"}, "activation is 'relu'"),
        (((3, 4), (5, 4), None), {"residual": torch.zeros(3, 4)}, r"residual must have shape \(3, 5\)"),
    ],
)
def test_bad_arguments(shapes, options, message):
    x, weight, bias = (None if shape is None else torch.randn(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        ops.linear_act(x, weight, bias, **options)


@pytest.mark.skipif(TRITON_DEVICE is None, reason="no GPU, and Triton does not interpret")
class TestTriton:
    """The kernel's ways to read tiles, and several tiles per program."""

    @pytest.fixture(autouse=True)
    def kernels(self, monkeypatch):
        """The kernel for many rows, which few rows use too."""
        monkeypatch.setattr(triton.kernels("few_rows"), "MAX_ROWS", 0)
        return triton.kernels("linear_act")

    def described(self, kernels, *arguments):
        """Whether the tensor memory accelerator would be used on a GPU that has one."""
        with triton.kernels("_launch").record(90) as recorder, ops.use_backend("triton"):
            ops.linear_act(*arguments)
        return recorder.launches[0].constants["DESCRIBED"]

    def check(self, x, weight, bias=None, activation="none", residual=None):
        with ops.use_backend("triton"):
            actual = ops.linear_act(x, weight, bias, activation, residual=residual)
        exact = SPEC.reference(x, weight, bias, activation, residual, upcast=True)
        torch.testing.assert_close(actual.double(), exact, atol=2e-3, rtol=2e-3)

    @pytest.mark.parametrize("activation", EAGER)
    @pytest.mark.parametrize("rows", [1, 5, 70])
    def test_triton_descriptors_and_pointers_agree(self, kernels, monkeypatch, rows, activation):
        x, weight, bias, residual = (
            torch.randn(shape, device=TRITON_DEVICE).half() for shape in ((rows, 72), (40, 72), (40,), (rows, 40))
        )
        weight /= 8
        if rows > 1:
            residual = residual.t().contiguous().t()
        assert self.described(kernels, x, weight, bias, activation)
        self.check(x, weight, bias, activation, residual)
        monkeypatch.setattr(kernels, "_describable", lambda _: False)
        assert not self.described(kernels, x, weight, bias, activation)
        self.check(x, weight, bias, activation, residual)

    @pytest.mark.parametrize(
        ("x", "weight", "described"),
        [
            ((6, 64), (24, 64), True),
            ((2, 3, 64), (24, 64), True),
            ((6, 63), (24, 63), False),
            ((6, 64), (20, 64), False),
        ],
        ids=str,
    )
    def test_triton_describes_what_is_aligned(self, kernels, x, weight, described):
        x, weight = (torch.randn(shape, device=TRITON_DEVICE).half() for shape in (x, weight))
        assert self.described(kernels, x, weight, None, "gelu") == described
        self.check(x, weight / 8, None, "gelu")

    @pytest.mark.parametrize(
        ("layout", "described"),
        [
            (lambda t: t[:, :64], True),
            (lambda t: t[:, 8:72], True),
            (lambda t: t[:, 1:65], False),
            (lambda t: t.view(-1)[: 6 * 68].view(6, 68)[:, :64], False),
            (lambda t: t[:1, :64].expand(6, 64), False),
            (lambda t: t[:, :64].unflatten(0, (2, 3)), True),
            (lambda t: t[:, :64].unflatten(0, (2, 3))[:, :2], False),
            (lambda t: t[:, :64].unflatten(0, (2, 3))[:, :1], True),
        ],
        ids=["wide", "shifted", "misaligned", "odd rows", "expanded", "two axes", "cut", "cut to one"],
    )
    def test_triton_takes_rows_where_they_lie(self, kernels, layout, described):
        x = layout(torch.randn(6, 80, device=TRITON_DEVICE).half())
        weight = torch.randn(24, 64, device=TRITON_DEVICE).half() / 8
        assert self.described(kernels, x, weight, None, "gelu") == described
        self.check(x, weight, None, "gelu")

    @pytest.mark.parametrize("inputs", [40, 41])
    def test_triton_takes_several_tiles_a_program(self, kernels, monkeypatch, inputs):
        """Several groups of rows, the last one shorter."""
        monkeypatch.setattr(kernels, "multiprocessors", lambda _: 1)
        x, weight, bias = (torch.randn(s, device=TRITON_DEVICE).half() for s in ((600, inputs), (72, inputs), (72,)))
        self.check(x, weight / 8, bias, "quick_gelu")

    @pytest.mark.parametrize("described", [True, False])
    def test_triton_offsets_beyond_32_bits(self, kernels, monkeypatch, described):
        """Rows that are 2³¹ elements apart, in memory that is hardly touched."""
        far = 1 << 31

        def spread(rows):
            memory = torch.empty(far * (rows - 1) + 64, dtype=torch.float16, device=TRITON_DEVICE)
            return memory.as_strided((rows, 64), (far, 1)).copy_(torch.randn(rows, 64) / 8)

        x, weight, residual = spread(2), spread(2), spread(2)
        weight = torch.cat([weight] * 4).as_strided((8, 64), (64, 1)) if described else weight
        residual = residual[:, : weight.shape[0]]
        monkeypatch.setattr(
            kernels, "_describable", lambda matrix, real=kernels._describable: described and real(matrix)
        )
        self.check(x, weight, None, "gelu", residual)

    def test_triton_saves_z_only_for_training(self, kernels):
        x, weight = (torch.randn(6, 64, device=TRITON_DEVICE).half() for _ in range(2))
        for training in (False, True):
            x.requires_grad_(training)
            with triton.kernels("_launch").record(90) as recorder, ops.use_backend("triton"):
                ops.linear_act(x, weight, None, "gelu")
            assert [launch.constants["SAVES_Z"] for launch in recorder.launches] == [training]

    @pytest.mark.parametrize("activation", ["none", "gelu"])
    def test_triton_trains_in_a_compiled_graph(self, activation):
        given = [torch.randn(s, device=TRITON_DEVICE, requires_grad=True) for s in ((5, 12), (8, 12), (8,), (5, 8))]
        seen = []

        def loss(x, weight, bias, residual):
            return (ops.linear_act(x * 2, weight, bias, activation, residual=residual) * 3).square().mean()

        def backend(graph, _):
            seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
            return graph.forward

        with ops.use_backend("triton"):
            expected = torch.autograd.grad(loss(*given), given)
            for kind in (backend, "aot_eager"):
                torch._dynamo.reset()
                actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=kind)(*given), given)
                for one, other in zip(actual, expected, strict=True):
                    torch.testing.assert_close(one, other)
        assert torch.ops.mplug2_fast.linear_act_train.default in seen


class TestWhatIsFaster:
    """Why cuBLAS is preferred without timing."""

    @pytest.fixture(autouse=True)
    def _triton(self):
        pytest.importorskip("triton")
        if triton.INTERPRETED:
            pytest.skip("nothing is known to be faster under the interpreter")

    def reasons(self, dtype=torch.bfloat16, activation="none", residual=None, needs_grad=False):
        x, weight = torch.randn(40, 8, dtype=dtype), torch.randn(16, 8, dtype=dtype)
        op = ops.linear_act.op
        return op.backends["triton"].slower_reasons(needs_grad, op.arguments(x, weight, None, activation, residual))

    def test_nothing_to_fuse(self):
        (why,) = self.reasons()
        assert why.startswith("there is nothing to fuse with the product")
        assert self.reasons(activation="gelu") == self.reasons(residual=torch.randn(40, 16)) == []

    def test_few_rows_have_a_kernel_of_their_own(self):
        x, weight = torch.randn(32, 8, dtype=torch.bfloat16), torch.randn(16, 8, dtype=torch.bfloat16)
        op = ops.linear_act.op
        assert op.backends["triton"].slower_reasons(False, op.arguments(x, weight, None, "none", None)) == []

    def test_float32_without_tf32(self):
        (why,) = self.reasons(torch.float32, "gelu")
        assert why.startswith("float32 without TF32 keeps tensor cores idle")
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            assert self.reasons(torch.float32, "gelu") == []
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    def test_what_tuning_found(self, monkeypatch):
        race = triton.kernels("linear_act").AGAINST_TORCH
        asked = []
        monkeypatch.setattr(race, "lost", lambda device, key: asked.append((device.type, key)) or "0.02 against 0.03")
        assert self.reasons(activation="gelu") == ["0.02 against 0.03"]
        assert asked == [("cpu", (torch.bfloat16, 64, 16, 8, "gelu", False, False))]
        assert self.reasons(activation="gelu", needs_grad=True) == [], "the forward alone was timed"
