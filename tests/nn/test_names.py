"""State dicts have the names of the replaced modules, and parameters can be shared with them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mplug2_fast import MPlug2Config
from mplug2_fast.nn import MLP, CrossAttention, FusionLayer, LayerNorm, SelfAttention, TemporalBlock
from tests.nn.cases import DIM, HEADS, HIDDEN, TorchBert, by_official_name, randomise, text_config

KEYS = Path(__file__).parents[1] / "checkpoint/data/large_keys.txt"
LARGE = MPlug2Config.preset("large").text


def official_shapes(prefix, without=()):
    """Name without the prefix -> shape, from the list of an official checkpoint."""
    lines = [
        line.removeprefix(prefix).split(" ", 1) for line in KEYS.read_text().splitlines() if line.startswith(prefix)
    ]
    return {name: tuple(map(int, shape[1:-1].split(", "))) for name, shape in lines if not name.startswith(without)}


def shapes(named):
    return {name: tuple(parameter.shape) for name, parameter in named.items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention])
def test_attention_has_the_names_of_torch(kind, bias):
    theirs = torch.nn.MultiheadAttention(DIM, HEADS, 0.1, bias)
    ours = kind(DIM, HEADS, 0.1, bias)
    assert list(shapes(ours.state_dict()).items()) == list(shapes(theirs.state_dict()).items())
    assert ours.dropout.p == theirs.dropout
    if bias:
        assert not ours.in_proj_bias.any()
        assert not ours.out_proj.bias.any()


def test_block_has_the_official_names():
    with torch.device("meta"):
        block = TemporalBlock(1024, 16)
    expected = official_shapes("visual_encoder.visual.transformer.resblocks.{0..23}.")
    assert shapes(by_official_name(block, lambda parameter: parameter)) == expected


def test_block_without_temporal_modules_has_the_names_of_clip():
    with torch.device("meta"):
        block = TemporalBlock(768, 12, temporal=False)
    assert shapes(block.state_dict()) == official_shapes("visual_encoder.transformer.resblocks.{0..11}.")


@pytest.mark.parametrize(
    ("prefix", "cross_attention"),
    [
        ("text_decoder.bert.encoder.layer.{0..11}.", True),
        ("text_encoder.encoder.layer.{0..23}.", False),
        ("fusion_encoder.encoder.layer.{0..23}.", True),
    ],
)
def test_fusion_layer_has_the_official_names(prefix, cross_attention):
    with torch.device("meta"):
        layer = FusionLayer.from_config(LARGE, cross_attention=cross_attention)
    expected = official_shapes(prefix, without=("latents", "intermediate_vision", "output_vision"))
    assert shapes(layer.state_dict()) == expected


def test_a_new_block_computes_what_clips_block_does():
    ours, plain = TemporalBlock(DIM, HEADS), TemporalBlock(DIM, HEADS, temporal=False)
    plain.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(2, 3, 5, DIM)
    torch.testing.assert_close(ours(x), plain(x))


def test_layer_norm_and_mlp():
    assert list(LayerNorm(8).state_dict()) == ["weight", "bias"]
    assert list(MLP(8, 16).state_dict()) == ["c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"]
    assert list(MLP(8, 16, bias=False).state_dict()) == ["c_fc.weight", "c_proj.weight"]
    assert MLP(8, 16).activation == "quick_gelu"


def test_a_fusion_layer_shares_the_parameters_of_another_layer():
    theirs = randomise(TorchBert(text_config(), cross_attention=True))
    with torch.device("meta"):
        ours = FusionLayer.from_config(text_config())
    ours.load_state_dict(theirs.state_dict(keep_vars=True), assign=True)
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert ours.get_parameter(name) is parameter
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    inputs = {"x": torch.randn(2, 5, DIM), "memory": torch.randn(2, 7, DIM)}
    before = ours(**inputs)
    before.square().mean().backward()
    optimizer.step()
    assert not torch.allclose(ours(**inputs), before)
    torch.testing.assert_close(ours(**inputs), theirs(**inputs), atol=1e-5, rtol=1e-5)


def test_fusion_layer_from_a_configuration():
    config = SimpleNamespace(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        layer_norm_eps=1e-3,
        hidden_dropout_prob=0.25,
        attention_probs_dropout_prob=0.75,
        hidden_act="gelu",
    )
    layer = FusionLayer.from_config(config)
    assert layer.attention.self.num_heads == HEADS
    assert layer.output.LayerNorm.eps == layer.crossattention.output.LayerNorm.eps == 1e-3
    assert layer.output.dropout.p == layer.attention.output.dropout.p == 0.25
    assert layer.attention.self.dropout.p == layer.crossattention.self.dropout.p == 0.75
    config.hidden_act = "relu"
    with pytest.raises(ValueError, match="hidden_act 'relu'"):
        FusionLayer.from_config(config)


@pytest.mark.parametrize("hidden", [0.0, 1.0])
@pytest.mark.parametrize("attention", [0.0, 1.0])
def test_dropout_is_where_the_official_layer_has_it(hidden, attention):
    """Probabilities of 0 and 1 make dropout deterministic."""
    config = text_config(hidden, attention)
    theirs = randomise(TorchBert(config, cross_attention=True))
    ours = FusionLayer.from_config(config)
    ours.load_state_dict(theirs.state_dict())
    inputs = {"x": torch.randn(2, 5, DIM), "memory": torch.randn(2, 7, DIM)}
    torch.testing.assert_close(ours(**inputs), theirs(**inputs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.eval()(**inputs), theirs.eval()(**inputs), atol=1e-5, rtol=1e-5)


def make_inputs():
    return torch.randn(2, 3, 5, DIM), torch.randn(2, 3, 7, DIM)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: SelfAttention(DIM, HEADS)(x, key_padding_mask=torch.ones(6, 5)), r"\(2, 3, 5\), got \(6, 5\)"),
        (lambda x, m: CrossAttention(DIM, HEADS)(x, m[0]), r"leading axes, got \(2, 3\) and \(3,\)"),
        (lambda x, m: CrossAttention(DIM, HEADS)(x, m.view(3, 2, 7, DIM)), r"leading axes, got \(2, 3\) and \(3, 2\)"),
        (lambda x, m: CrossAttention(DIM, HEADS)(x, m, key_padding_mask=torch.ones(2, 3, 5)), r"\(2, 3, 7\), got"),
        (lambda x, m: SelfAttention(DIM, HEADS)(x[..., :-1]), "in_features"),
        (lambda x, m: FusionLayer.from_config(text_config(), cross_attention=False)(x, memory=m), "without cross-att"),
        (lambda x, m: TemporalBlock(30, 4), "embed_dim 30 is not a multiple of num_heads 4"),
        (lambda x, m: FusionLayer(hidden_size=30, num_attention_heads=4, intermediate_size=8), "not a multiple"),
    ],
)
def test_errors_for_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(*make_inputs())
