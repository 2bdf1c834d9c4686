import copy

import pytest
import torch
from torch import nn

from mplug2_fast.nn import MLP, LocalTemporal, SelfAttention, TemporalBlock
from mplug2_fast.nn.bert_layer import BertLayer
from mplug2_fast.nn.int8 import Int8Linear
from mplug2_fast.nn.quantise import quantise, smooth


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def randomised(module):
    """Also biases, norms and the up-projections of temporal modules, which are zero or one at first."""
    for parameter in module.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


MODULES = {
    "attention": (lambda: SelfAttention(64, 4), (2, 9, 64), 2),
    "mlp": (lambda: MLP(64, 256), (2, 9, 64), 2),
    "local temporal": (lambda: LocalTemporal(64), (2, 3, 9, 64), 2),
    "block": (lambda: TemporalBlock(64, 4), (2, 3, 9, 64), 8),
    "bert": (
        lambda: BertLayer(
            hidden_size=64, num_attention_heads=4, intermediate_size=256, cross_attention=False, fused_projections=True
        ),
        (2, 9, 64),
        4,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_close_to_the_wide_module(name, dtype):
    torch.manual_seed(0)
    build, shape, count = MODULES[name]
    wide = randomised(build())
    quantised = copy.deepcopy(wide)
    names = quantise(quantised)
    assert len(names) == count
    assert sum(isinstance(each, Int8Linear) for each in quantised.modules()) == count
    x = torch.randn(shape)
    expected, found = wide(x), quantised.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert relative(found.float(), expected) < 0.02


def test_every_call_computes_with_the_fused_epilogue():
    """Activations and residuals are those of the wide layers: a module called layer by layer gives the same."""
    torch.manual_seed(0)
    module = randomised(TemporalBlock(64, 4))
    quantise(module)
    x = torch.randn(2, 3, 9, 64)
    expected = module(x)
    for layer in list(module.modules()):
        if isinstance(layer, Int8Linear):
            layer.register_forward_hook(lambda *_: None)
    assert relative(module(x), expected) < 1e-5


def test_large_blocks_of_rows_are_split(monkeypatch):
    module = randomised(MLP(64, 256))
    quantise(module)
    x = torch.randn(7, 64)
    expected = module(x, residual=True)
    monkeypatch.setattr("mplug2_fast.nn.mlp._BLOCK_BYTES", 3 * 256 * 4)
    assert torch.equal(module(x, residual=True), expected)


def test_outliers_of_norms_are_smoothed():
    """Some channels are large after the norm, as in trained vision encoders."""
    torch.manual_seed(0)
    wide = randomised(TemporalBlock(64, 4))
    for norm in (wide.ln_1, wide.ln_2, wide.lmhra1.ln, wide.lmhra2.ln):
        norm.weight[::16] *= 30
    x = torch.randn(2, 3, 9, 64)
    smoothed = copy.deepcopy(wide)
    for norm, weight in (
        (smoothed.ln_1, smoothed.attn.in_proj_weight),
        (smoothed.ln_2, smoothed.mlp.c_fc.weight),
        (smoothed.lmhra1.ln, smoothed.lmhra1.down_proj.weight.flatten(1)),
    ):
        smooth(norm, weight)
        assert norm.weight.abs().max() < 12
    expected = wide(x)
    assert relative(smoothed(x), expected) < 1e-6
    errors = []
    for way in (quantise, quantise_without_smoothing):
        quantised = copy.deepcopy(wide)
        way(quantised)
        errors.append(relative(quantised(x), expected))
    assert errors[0] < 0.6 * errors[1], errors


def quantise_without_smoothing(module):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mplug2_fast.nn.quantise.smooth", lambda *_: None)
        quantise(module)


def test_layers_are_kept():
    module = TemporalBlock(64, 4)
    names = quantise(module, keep=lambda name: name.startswith("lmhra"))
    assert sorted(names) == ["attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"]
    assert isinstance(module.lmhra1.down_proj, nn.Conv3d)


def test_twice_is_once():
    module = randomised(TemporalBlock(64, 4))
    quantise(module, keep=lambda name: "mlp" in name)
    state = copy.deepcopy(module.state_dict())
    assert sorted(quantise(module)) == ["mlp.c_fc", "mlp.c_proj"]
    assert all(
        torch.equal(module.state_dict()[name], state[name])
        for name in state
        if "mlp" not in name and name[:4] != "ln_2"
    )
    assert quantise(module) == []


def test_scales_stay_float32():
    layer = Int8Linear.of(torch.randn(3, 4), torch.randn(3)).to(torch.bfloat16)
    assert (layer.weight.dtype, layer.scale.dtype, layer.bias.dtype) == (torch.int8, torch.float32, torch.bfloat16)
    again = Int8Linear(torch.zeros(3, 4, dtype=torch.int8), torch.zeros(3), torch.zeros(3))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.scale, layer.scale)
    assert torch.equal(again.weight, layer.weight)
