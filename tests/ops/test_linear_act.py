import copy
import io

import pytest
import torch
from torch.nn import functional as F

from mplug2_fast import ops
from mplug2_fast.ops import onednn
from mplug2_fast.ops.linear_act import quick_gelu
from tests.ops.suite import DifferentiableOpSuite


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


class TestPacking:
    @pytest.fixture
    def layer(self):
        torch.manual_seed(0)
        return torch.nn.Linear(32, 48).requires_grad_(False)

    def check(self, layer, is_packed):
        x = torch.randn(80, 32)
        torch.testing.assert_close(ops.linear_act(x, layer.weight, layer.bias), F.linear(x, layer.weight, layer.bias))
        assert (onednn.packed(layer.weight) is not None) == is_packed

    def test_the_packed_weight_serves(self, layer, monkeypatch):
        ops.pack_weight(layer.weight, 80)
        self.check(layer, True)
        seen = []
        linear = torch.ops.mkldnn._linear_pointwise
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, w, *a: seen.append(w) or linear(x, w, *a))
        self.check(layer, True)
        assert seen[0].is_mkldnn
        ops.unpack_weight(layer.weight)
        self.check(layer, False)

    def test_a_changed_weight_is_used_as_it_is(self, layer):
        ops.pack_weight(layer.weight, 80)
        layer.weight.mul_(2)
        self.check(layer, False)

    def test_a_moved_weight_is_used_as_it_is(self, layer):
        ops.pack_weight(layer.weight, 80)
        layer.double().float()
        self.check(layer, False)

    def test_weights_of_inference_mode_are_left_alone(self):
        """Torch does not count their changes."""
        with torch.inference_mode():
            layer = torch.nn.Linear(32, 48)
            ops.pack_weight(layer.weight, 80)
            self.check(layer, False)

    def test_copies_and_files_are_unpacked(self, layer):
        ops.pack_weight(layer.weight, 80)
        self.check(copy.deepcopy(layer), False)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        self.check(torch.load(file, weights_only=False), False)
        assert list(layer.state_dict()) == ["weight", "bias"]


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
