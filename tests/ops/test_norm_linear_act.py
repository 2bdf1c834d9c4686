import pytest
import torch

from mplug2_fast import ops
from tests.ops.suite import DifferentiableOpSuite


class TestSpecification(DifferentiableOpSuite):
    operator = ops.norm_linear_act


def test_bad_arguments():
    x, norm, weight = torch.randn(2, 8), torch.ones(8), torch.randn(4, 8)
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.norm_linear_act(x, norm[:3], norm, weight)
    with pytest.raises(ValueError, match="in_features"):
        ops.norm_linear_act(x, norm, norm, weight[:, :3])
    with pytest.raises(ValueError, match="activation is 'relu'"):
        ops.norm_linear_act(x, norm, norm, weight, None, "relu")
