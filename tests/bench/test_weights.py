import torch

from bench.weights import fill, official_weight
from mplug2_fast import MPlug2Config
from mplug2_fast.models.mplug2 import MPlug2ForCaptioning
from mplug2_fast.reference import MPlug2ForCaptioning as ReferenceForCaptioning

TINY = MPlug2Config.preset("tiny")


def test_both_implementations_hold_the_same_weights_and_none_is_zero():
    models = [ReferenceForCaptioning(TINY), MPlug2ForCaptioning(TINY)]
    expected, found = (model.official_parameters() for model in models)
    for parameters in (expected, found):
        fill(parameters)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert weight.count_nonzero() > 0.99 * weight.numel(), name
        assert torch.equal(found[name], weight), name
    filled = sum(view.numel() for view in found.values())
    assert filled == sum(p.numel() for p in models[1].parameters()), "a parameter has no official name"


def test_values_depend_on_name_and_seed():
    name, shape = "text_decoder.bert.encoder.layer.0.output.dense.weight", torch.Size([64, 256])
    weight = official_weight(name, shape)
    assert torch.equal(weight, official_weight(name, shape))
    assert not torch.equal(weight, official_weight(name, shape, seed=1))
    assert not torch.equal(weight, official_weight(name.replace("0", "1"), shape))
    assert abs(float(weight.std()) * 16 - 1) < 0.05  # 1/√256
