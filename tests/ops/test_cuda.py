"""The CUDA kernels of linear_act and mlp: what they refuse and how that is told, which needs no GPU, and how operands
reach them."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.ops.runtime import cuda

BF16 = torch.bfloat16
NOT_BUILT = "they were turned off by MPLUG2_FAST_CUDA"


def linear_reasons(rows=4, inputs=16, outputs=8, dtype=BF16, bias=None, residual=None):
    x, weight = torch.zeros(rows, inputs, dtype=dtype), torch.zeros(outputs, inputs, dtype=dtype)
    op = ops.linear_act.op
    return op.backends["cuda"].not_supported_reasons(op.arguments(x, weight, bias, "none", residual))


def mlp_reasons(channels=16, hidden=24, dtype=BF16, norm_weight=None):
    x, weight = torch.zeros(4, channels, dtype=dtype), torch.zeros(hidden, channels, dtype=dtype)
    op = ops.mlp.op
    arguments = op.arguments(x, weight, None, weight.t(), None, "none", norm_weight, None, 1e-5, True)
    return op.backends["cuda"].not_supported_reasons(arguments)


@pytest.fixture
def _built(monkeypatch):
    """Pretends that the kernels are built."""
    monkeypatch.setattr(cuda, "error", lambda: None)


@pytest.fixture
def launched(monkeypatch, native_module):
    """Records what would be launched."""
    calls = []
    module = SimpleNamespace(linear_act_cuda=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(cuda, "module", lambda: module)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    return calls


def test_it_is_for_gpus():
    explanation = ops.explain(ops.linear_act, torch.zeros(4, 8), torch.zeros(8, 8))
    assert explanation.reasons["cuda"] == ("supports cuda, got cpu",)
    with ops.use_backend("cuda"):
        assert ops.explain(ops.linear_act, torch.zeros(4, 8), torch.zeros(8, 8)).chosen is None


@pytest.mark.parametrize("reasons", [linear_reasons, mlp_reasons])
class TestRefusals:
    def test_where_they_are_not_built(self, reasons, monkeypatch):
        monkeypatch.setattr(cuda, "error", lambda: NOT_BUILT)
        assert reasons() == [f"there are no CUDA kernels: {NOT_BUILT}"]

    @pytest.mark.usefixtures("_built")
    def test_none(self, reasons):
        assert reasons() == reasons(dtype=torch.float16) == []

    @pytest.mark.usefixtures("_built")
    def test_another_type(self, reasons):
        assert reasons(dtype=torch.float32) == ["CUDA kernels support bfloat16 and float16, got torch.float32"]


@pytest.mark.usefixtures("_built")
class TestRefusalsOfArguments:
    def test_several_types(self):
        assert linear_reasons(bias=torch.zeros(8)) == ["bias is torch.float32, the first argument torch.bfloat16"]
        assert linear_reasons(residual=torch.zeros(4, 8)) == [
            "residual is torch.float32, the first argument torch.bfloat16"
        ]

    def test_rows_that_are_not_aligned(self):
        assert linear_reasons(inputs=20) == ["rows must be multiples of 8 elements, got 20"]
        assert linear_reasons(outputs=19) == ["rows must be multiples of 8 elements, got 19"]
        assert mlp_reasons(hidden=20) == ["rows must be multiples of 8 elements, got 20"]

    def test_nothing_to_multiply(self):
        assert linear_reasons(outputs=0) == ["the weight is empty"]

    def test_another_gpu(self, monkeypatch):
        monkeypatch.setattr(cuda, "_capability", lambda device: (8, 0))
        x = SimpleNamespace(device=torch.device("cuda", 0), dtype=BF16)
        assert cuda.reasons(x) == ["CUDA kernels support compute capability 9.0, got 8.0"]


@pytest.mark.parametrize("name", ["linear_act", "mlp"])
def test_few_rows_are_left_to_others(name):
    op = ops.OPERATORS[name].op
    given = op.spec.inputs(op.spec.edge_cases[0], BF16)
    (why,) = op.backends["cuda"].slower_reasons(False, op.arguments(**given))
    assert re.search(r"\d+ rows do not fill the GPU: the CUDA kernel wins from \d+ rows on", why)


def test_why_they_are_not_there(native_module):
    """A module that was built without the kernels says why."""
    assert cuda.error() == (native_module.no_cuda_because or None)
    assert hasattr(native_module, "linear_act_cuda") == (cuda.error() is None)


def test_without_the_native_module(monkeypatch):
    monkeypatch.setattr(cuda, "native_error", lambda: SimpleNamespace(reason="no compiler."))
    assert cuda.error.__wrapped__() == "there is no native module: no compiler."


class TestRows:
    """Views are passed without a copy if the tensor memory accelerator can address them."""

    def test_views(self):
        wide = torch.zeros(3, 5, 32, dtype=BF16)
        for view in (wide, wide[..., :16], wide[:, 2], wide[0, 0]):
            assert cuda.rows(view).data_ptr() == view.data_ptr()
        assert cuda.rows(wide[..., :16]).stride() == (32, 1)

    def test_copies(self):
        wide = torch.arange(3 * 5 * 32.0).view(3, 5, 32).to(BF16)
        shifted, narrow, crossed = wide[..., 1:9], torch.zeros(4, 12, dtype=BF16)[:, :8], wide.transpose(0, 1)
        for view in (shifted, narrow, crossed, wide[..., ::2], wide[:1, :1].expand(3, 5, 32)):
            found = cuda.rows(view)
            assert found.is_contiguous()
            assert torch.equal(found, view.flatten(0, -2))


def test_what_is_launched(launched):
    x, weight = torch.zeros(2, 3, 32, dtype=BF16)[..., :16], torch.zeros(8, 16, dtype=BF16)
    bias, residual, out = (torch.zeros(*size, dtype=BF16) for size in ((8,), (2, 3, 8), (2, 3, 8)))
    cuda.linear_act(x, weight, bias, "gelu", residual, out)
    cuda.linear_act(x.half(), weight.half(), None, "none", None, out.half())
    (first, second) = launched
    assert first[:4] == (True, (6, 16, 8), x.data_ptr(), 32)
    assert first[4:7] == (weight.data_ptr(), 16, bias.data_ptr())
    assert first[7].name == "gelu"
    assert first[8:] == (residual.data_ptr(), 8, out.data_ptr(), 77)
    assert second[0] is False
    assert second[6] == second[8] == second[9] == 0
