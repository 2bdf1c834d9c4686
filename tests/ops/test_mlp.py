import sys

import pytest
import torch

from mplug2_fast import ops
from tests.ops.suite import DifferentiableOpSuite


class TestSpecification(DifferentiableOpSuite):
    operator = ops.mlp

    @pytest.fixture(autouse=True)
    def _several_blocks(self, monkeypatch):
        """The last one shorter than the others."""
        monkeypatch.setattr(sys.modules["mplug2_fast.ops.mlp"], "_BLOCK_BYTES", 4 * 40 * 4)


def test_the_input_is_left_alone():
    x = torch.randn(80, 12)
    before = x.clone()
    parameters = torch.randn(40, 12), torch.randn(40), torch.randn(12, 40), torch.randn(12)
    out = ops.mlp(x, *parameters, activation="quick_gelu")
    assert torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr()


def test_shapes_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"proj_weight must have shape \(12, 40\)"):
        ops.mlp(torch.randn(3, 12), torch.randn(40, 12), None, torch.randn(40, 12), None, activation="gelu")
