"""The loss of queries among many keys is the cross-entropy of all scores, also in its gradients."""

import pytest
import torch
from torch.nn import functional as F

from mplug2_fast.nn import contrast
from mplug2_fast.nn.contrast import Keys, contrast_loss


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_it_is_the_cross_entropy_of_all_scores(alpha, monkeypatch):
    monkeypatch.setattr(contrast, "KEY_BLOCK", 5)
    torch.manual_seed(0)
    queries, teacher, batch = (F.normalize(torch.randn(4, 6, dtype=torch.float64), dim=1) for _ in range(3))
    queue, ids = F.normalize(torch.randn(6, 13, dtype=torch.float64), dim=0), torch.tensor([1, 2, 2, 3])
    keys = [Keys(batch.T, ids), Keys(queue, torch.arange(13))]
    inputs = queries.requires_grad_(), torch.full((1,), 0.07, dtype=torch.float64, requires_grad=True)

    def all_scores(queries, temperature):
        every = torch.cat([batch.T, queue], dim=1)
        same = (ids[:, None] == torch.cat([each.ids for each in keys])).double()
        soft = (teacher @ every / temperature.detach()).softmax(dim=1)
        targets = alpha * soft + (1 - alpha) * same / same.sum(dim=1, keepdim=True)
        return F.cross_entropy(queries @ every / temperature, targets)

    def in_blocks(queries, temperature):
        return contrast_loss(queries, ids, keys, temperature, teacher=teacher, alpha=alpha)

    expected, found = all_scores(*inputs), in_blocks(*inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(in_blocks(*inputs), inputs[:1], create_graph=True)
