import pytest
import torch
from torch.nn import functional as F

from mplug2_fast.ops import onednn
from mplug2_fast.ops.linear_act import linear_act, quick_gelu
from tests.tolerance import assert_three_way

ACTIVATIONS = {"none": lambda x: x, "gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 8), (5, 33), (2, 3, 7, 64), (0, 16), (257, 1)])
def test_against_float64(shape, activation, dtype):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(shape), "weight": torch.randn(19, shape[-1]), "bias": torch.randn(19)}
    assert_three_way(
        lambda x, weight, bias: linear_act(x, weight, bias, activation),
        lambda x, weight, bias: ACTIVATIONS[activation](F.linear(x, weight, bias)),
        inputs,
        dtype,
    )


def test_strided_input_and_no_bias():
    x, weight = torch.randn(6, 10, 8)[::2, 1:9:2, :], torch.randn(16, 5)[::2].t()
    torch.testing.assert_close(linear_act(x, weight), x @ weight.t())


def test_onednn_steps_back_where_it_cannot_serve():
    x = torch.randn(3, 4)
    assert not onednn.serves(x.double())
    assert not onednn.serves(x.clone().requires_grad_())
    assert not onednn.serves(x, torch.randn(2, 4).bfloat16())
    assert not onednn.serves(x[:0])
    with torch.no_grad():
        assert onednn.serves(x.requires_grad_()) == torch.backends.mkldnn.is_available()


def test_quick_gelu():
    assert quick_gelu(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.0, 1 / (1 + 2.718281828**-1.702)])


def test_under_torch_compile():
    compiled = torch.compile(lambda x, w, b: linear_act(x, w, b, "gelu"), fullgraph=True, backend="eager")
    x, weight, bias = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight, bias), F.gelu(F.linear(x, weight, bias)))
