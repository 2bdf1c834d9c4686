import torch

from bench.peer import Peer
from bench.weights import fill, released_weight
from mplug2_fast import MPlug2Config
from mplug2_fast.models.mplug2 import MPlug2ForCaptioning
from mplug2_fast.reference import MPlug2ForCaptioning as ReferenceForCaptioning

TINY = MPlug2Config.preset("tiny")


def test_all_implementations_hold_the_same_weights_and_none_is_zero():
    models = [ReferenceForCaptioning(TINY), MPlug2ForCaptioning(TINY), Peer(TINY)]
    views = [model.official_parameters() for model in models]
    for parameters in views:
        fill(parameters)
    assert views[0].keys() == views[1].keys() == views[2].keys()
    for name, expected in views[0].items():
        assert expected.count_nonzero() > 0.99 * expected.numel(), name
        assert all(torch.equal(parameters[name], expected) for parameters in views[1:]), name
    filled = sum(view.numel() for view in views[2].values())
    assert filled == sum(p.numel() for p in models[2].parameters()), "a parameter of the peer has no released name"


def test_values_follow_from_name_and_seed():
    name, shape = "text_decoder.bert.encoder.layer.0.output.dense.weight", torch.Size([64, 256])
    weight = released_weight(name, shape)
    assert torch.equal(weight, released_weight(name, shape))
    assert not torch.equal(weight, released_weight(name, shape, seed=1))
    assert not torch.equal(weight, released_weight(name.replace("0", "1"), shape))
    assert abs(float(weight.std()) * 16 - 1) < 0.05  # 1/√256
