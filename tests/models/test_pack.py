"""Packed weights: the same results, the same state dict, and only where they serve."""

import pytest
import torch

from mplug2_fast.ops.runtime import onednn
from tests.tiny import SMALL, pair, random_video


@pytest.fixture(params=["captioning", "question_answering"])
def model(request, monkeypatch, native_module):
    monkeypatch.setattr(onednn, "pays", lambda weight, rows: True)
    return pair(SMALL, request.param)[1]


def is_packed(model):
    return [onednn.is_packed(weight) for weight in model.wide_weights()]


@torch.no_grad()
def check(model):
    """A packed model computes as one that was made from its state dict."""
    assert all(is_packed(model))
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    video = random_video(SMALL)
    torch.testing.assert_close(model.encode_video(video), fresh.encode_video(video))


def test_packing_changes_neither_results_nor_the_state_dict(model):
    before, keys = model.encode_video(random_video(SMALL)), list(model.state_dict())
    assert not any(is_packed(model))
    assert model.pack() is model
    assert all(is_packed(model))
    torch.testing.assert_close(model.encode_video(random_video(SMALL)), before)
    assert list(model.state_dict()) == keys
    model.unpack()
    assert not any(is_packed(model))


@pytest.mark.parametrize("fused", [False, True])
def test_training_goes_on_with_the_weights_as_they_are(model, fused):
    model.pack()
    check(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    model.encode_video(random_video(SMALL)).square().mean().backward()
    optimizer.step()
    check(model)


def test_a_moving_average_takes_the_place_of_the_weights_and_gives_it_back(model):
    model.pack()
    check(model)
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for values in ({name: value + 0.1 * torch.randn_like(value) for name, value in own.items()}, own):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(values[name])
        check(model)


def test_wide_weights_are_named_once(model):
    weights = list(model.wide_weights())
    assert len({id(weight) for weight in weights}) == len(weights)
    assert len(weights) < len([p for p in model.parameters() if p.ndim == 2])


def test_every_product_of_a_vision_block_takes_a_packed_weight(model):
    packed = {id(weight) for weight in model.wide_weights()}
    for block in model.visual.blocks:
        assert {id(p) for name, p in block.named_parameters() if p.ndim > 1 and ".conv." not in name} <= packed
