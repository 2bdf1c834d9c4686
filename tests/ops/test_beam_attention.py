import pytest
import torch

from mplug2_fast import ops
from tests.ops.suite import TRITON_DEVICE, DifferentiableOpSuite, device


class TestSpecification(DifferentiableOpSuite):
    operator = ops.beam_attention


@pytest.mark.parametrize("backend", ["triton", "torch"] if TRITON_DEVICE else ["torch"])
def test_memories_of_several_lengths(backend):
    """A mask that ends in the first of several parts, one without a key, one whose first part is padding."""
    query = torch.randn(3, 5, 2, 16, device=device(backend)).requires_grad_()
    key, value = (torch.randn(3, 2, 600, 16, device=query.device).requires_grad_() for _ in range(2))
    mask = torch.ones(3, 600, dtype=torch.uint8, device=query.device)
    mask[0, 40:], mask[1], mask[2, :310] = 0, 0, 0
    found, expected = [], []
    for results, name in ((found, backend), (expected, "reference")):
        with ops.use_backend(name):
            out = ops.beam_attention(query, key, value, key_padding_mask=mask)
        results += [out, *torch.autograd.grad(out.square().sum(), [query, key, value])]
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    assert not found[0][1].any()
    assert all(not gradient[1].any() for gradient in found[1:])
