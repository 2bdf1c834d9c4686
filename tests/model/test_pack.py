"""Packed weights: the same results, the same state dict, and only where they serve."""

import pytest
import torch

from mplug2_fast.ops import onednn
from tests.models import SMALL, pair, random_video


@pytest.fixture(params=["captioning", "question_answering"])
def model(request):
    return pair(SMALL, request.param)[1]


def is_packed(model):
    return [onednn.packed(weight) is not None for weight in model.wide_weights()]


def test_packing_changes_neither_results_nor_the_state_dict(model):
    before, keys = model.encode_video(random_video(SMALL)), list(model.state_dict())
    assert not any(is_packed(model))
    assert model.pack() is model
    assert all(is_packed(model))
    torch.testing.assert_close(model.encode_video(random_video(SMALL)), before)
    assert list(model.state_dict()) == keys
    model.unpack()
    assert not any(is_packed(model))


def test_training_goes_on_with_the_weights_as_they_are(model):
    model.pack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.encode_video(random_video(SMALL)).square().mean().backward()
    optimizer.step()
    assert not any(
        packed for packed, weight in zip(is_packed(model), model.wide_weights(), strict=True) if weight.grad is not None
    )
    plain = model.encode_video(random_video(SMALL)).detach()
    model.unpack()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_video(random_video(SMALL)), plain)


def test_wide_weights_are_named_once(model):
    weights = list(model.wide_weights())
    assert len({id(weight) for weight in weights}) == len(weights)
    assert len(weights) < len([p for p in model.parameters() if p.ndim == 2])


def test_every_product_of_a_vision_block_takes_a_packed_weight(model):
    packed = {id(weight) for weight in model.wide_weights()}
    for block in model.visual.blocks:
        assert {id(p) for name, p in block.named_parameters() if p.ndim > 1 and ".conv." not in name} <= packed
