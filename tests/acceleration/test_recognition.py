"""Which modules are accelerated, which are left unchanged, and why."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mplug2_fast as mf
from mplug2_fast.acceleration.swap import STATE
from tests.acceleration import official_bert, official_vision
from tests.acceleration.official import MPLUG2
from tests.golden.cases import CAPTIONING, GoldenCase, relative_error
from tests.tiny import SMALL, pair, random_video

CASE = GoldenCase(CAPTIONING[0])


def reason(module, part=""):
    """Why a module, or a part of it, is left unchanged; "" if it is accelerated."""
    report = mf.accelerate(nn.ModuleDict({"m": module}))
    path = f"m.{part}" if part else "m"
    entry = next(entry for entry in report.entries if entry.path == path)
    return entry.reason if entry.replacement is None else ""


def config(**changes):
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **changes}
    return official_bert.bert_config(CASE.description["bert"], **changes)


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


# --- parts that other models have too


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (8,)])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str)
def test_layer_norm(shape, options):
    norm = randomised(nn.LayerNorm(8, **options))
    x = torch.randn(shape)
    expected = norm(x)
    assert reason(norm) == ""
    torch.testing.assert_close(norm(x), expected)


def test_unsupported_layer_norms():
    class Doubled(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(nn.LayerNorm):
        """Computes what LayerNorm does."""

    assert reason(nn.LayerNorm((3, 8))) == "it normalises over several axes: (3, 8)"
    assert reason(Doubled(8)) == "its class computes something other than LayerNorm on a trial input"
    assert reason(Named(8)) == ""


def test_linear():
    linear, x = nn.Linear(8, 5), torch.randn(600, 8)
    expected = linear(x)
    assert reason(linear) == ""
    with torch.no_grad():
        torch.testing.assert_close(linear(x), expected)
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    parametrised = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
    assert reason(parametrised) == "it is not a plain Linear"


@pytest.mark.parametrize("activation", [nn.GELU(), official_vision.QuickGELU()], ids=["gelu", "quick_gelu"])
def test_mlp(activation):
    mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(8, 32), gelu=activation, c_proj=nn.Linear(32, 8)))
    x = torch.randn(2, 3, 8) * 4
    expected = mlp(x)
    assert reason(mlp) == ""
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("activation", [nn.GELU(approximate="tanh"), nn.ReLU(), nn.SiLU()], ids=str)
def test_mlp_with_another_activation(activation):
    mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(8, 32), gelu=activation, c_proj=nn.Linear(32, 8)))
    assert reason(mlp) == "its activation is none of quick_gelu, gelu"
    assert hasattr(mlp.c_fc, STATE)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_multihead_attention(batch_first, bias):
    module = randomised(nn.MultiheadAttention(16, 2, batch_first=batch_first, bias=bias))
    x, memory = torch.randn(3, 3, 16), torch.randn(5, 3, 16)
    memory = memory.transpose(0, 1) if batch_first else memory
    padding = torch.tensor([[False, False, False], [False, False, True], [False, True, True]])
    causal = torch.full((3, 3), -torch.inf).triu(1)
    calls = [
        (x, x, x, {}),
        (x, memory, memory, {}),
        (x, x, x, {"key_padding_mask": padding}),
        (x, x, x, {"attn_mask": causal}),
        (x, x, x, {"attn_mask": causal.bool()}),
        (x, x, x, {"attn_mask": causal, "key_padding_mask": padding}),
    ]
    expected = [module(*args, need_weights=False, **masks)[0] for *args, masks in calls[:-1]]
    assert reason(module) == ""
    for (*args, masks), out in zip(calls, expected, strict=False):
        actual, weights = module(*args, need_weights=False, **masks)
        torch.testing.assert_close(actual, out)
        assert weights is None
        assert actual.is_contiguous()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"add_bias_kv": True}, "it adds a bias to keys and values (add_bias_kv)"),
        ({"add_zero_attn": True}, "it adds a zero to keys and values (add_zero_attn)"),
        ({"kdim": 8, "vdim": 8}, "its keys or values have other widths (kdim, vdim)"),
    ],
    ids=str,
)
def test_unsupported_multihead_attention(options, why):
    assert reason(nn.MultiheadAttention(16, 2, **options)) == why


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "attention weights"),
        ({"need_weights": False, "attn_mask": torch.ones(4, 4)}, "attn_mask"),
        ({"need_weights": False, "attn_mask": torch.eye(4) > 0}, "attn_mask"),
        ({"need_weights": False, "key_padding_mask": torch.zeros(3, 4)}, "key_padding_mask of torch.float32"),
    ],
    ids=["weights", "bias", "not causal", "float padding"],
)
def test_unserved_calls_of_multihead_attention(options, why):
    module, x = randomised(nn.MultiheadAttention(16, 2)), torch.randn(4, 3, 16)
    expected = module(x, x, x, **options)
    mf.accelerate(module)
    with pytest.warns(RuntimeWarning, match=why):
        actual = module(x, x, x, **options)
    assert torch.equal(actual[0], expected[0])


def test_clip_text_tower():
    model = MPLUG2.of(CASE).visual_encoder
    text = torch.randint(1, 200, (3, 77))
    with torch.no_grad():
        expected = model.encode_text(text)
        mf.accelerate(model)
        assert relative_error(model.encode_text(text), expected) < 1e-5


# --- the vision block


def block(**replaced):
    made = official_vision.TemporalBlock(64, 1)
    for name, module in replaced.items():
        made.set_submodule(name.replace("__", "."), module)
    return randomised(made)


@pytest.mark.parametrize("batch_first", [False, True], ids=["sequence first", "batch first in memory"])
@pytest.mark.parametrize("frames", [1, 3])
def test_block_keeps_the_layout_of_its_input(batch_first, frames):
    module, x = block(), torch.randn(10, 2 * frames, 64)
    expected = module(x, frames)
    if batch_first:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert reason(module) == ""
    out = module(x, T=frames, use_checkpoint=True)
    assert relative_error(out, expected) < 1e-5
    assert out.is_contiguous() is not batch_first
    assert out.transpose(0, 1).is_contiguous() is batch_first


def test_a_new_block_is_recognised_although_its_up_projections_are_zero():
    class NoActivation(official_vision.LocalTemporal):
        def forward(self, x):
            normed = self.ln(x.movedim(1, -1)).movedim(-1, 1)
            return self.up_proj(self.conv(self.down_proj(normed)))

    assert reason(official_vision.TemporalBlock(64, 1)) == ""
    other = official_vision.TemporalBlock(64, 1)
    other.lmhra2 = NoActivation(64)
    assert reason(other) == "on a trial input it computes something other than the official block"


@pytest.mark.parametrize(
    ("replaced", "why"),
    [
        ({"mlp__gelu": nn.ReLU()}, "its activation is none of quick_gelu, gelu"),
        (
            {"lmhra1__conv": nn.Conv3d(32, 32, (3, 1, 1), padding=(1, 0, 0))},
            "lmhra1.conv is not the expected convolution",
        ),
        ({"lmhra1__activation": nn.GELU()}, "on a trial input it computes something other"),
        ({"ln_2": nn.BatchNorm1d(64)}, "ln_2 is a BatchNorm1d, not a LayerNorm"),
        ({"attn": nn.MultiheadAttention(64, 1, add_zero_attn=True)}, "(add_zero_attn)"),
        ({"adapter": nn.Linear(64, 64)}, "it has an unknown part: adapter"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_unsupported_blocks(replaced, why):
    module = block(**replaced)
    assert why in reason(module)
    assert hasattr(module.mlp if "mlp__gelu" not in replaced else module.attn, STATE)


def test_a_block_that_computes_something_else():
    class Scaled(official_vision.TemporalBlock):
        def forward(self, x, T=8, use_checkpoint=False):
            return super().forward(x, T) + 1e-3 * x

    assert reason(Scaled(64, 1)) == "on a trial input it computes something other than the official block"


def test_paths_dropped_in_training():
    class DropPath(nn.Module):
        def forward(self, x):
            return x * 0 if self.training else x

    module, x = block(drop_path=DropPath()), torch.randn(5, 4, 64)
    assert reason(module) == ""
    module(x, 2)
    module.train()
    with pytest.warns(RuntimeWarning, match="drops paths"):
        assert torch.equal(module(x, 2), x)


# --- BERT


def layer(index=0, **changes):
    settings = config(num_hidden_layers=3, num_uni_layer=2, **changes)
    return randomised(official_bert.BertLayer(settings, index))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("decoder", [False, True])
def test_layers_in_all_modes(index, decoder):
    module = layer(index, add_cross_attention=decoder)
    x, memory = torch.randn(2, 4, 128), torch.randn(2, 6, 128)
    mask, memory_mask = torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 6)
    mask[0, ..., -1], memory_mask[1, ..., 3:] = -10000.0, -1e9
    calls = [(x, mask, None, memory, memory_mask, None, False, "norm")]
    calls += [] if decoder else [(x, mask), (x,)]
    # A layer that is not universal is left to itself in this mode, which is not for it.
    calls += [(x, mask, None, memory, memory_mask, None, False, "v_module")] if index else []
    causal = torch.full((1, 1, 4, 4), -10000.0).triu(1)  # for all rows
    calls.append((x, causal, None, memory, memory_mask[1:]))
    expected = [module(*call) for call in calls]
    assert reason(module) == ""
    for call, outputs in zip(calls, expected, strict=True):
        for actual, out in zip(module(*call), outputs, strict=True):
            assert relative_error(actual, out) < 1e-5


class ModalLayer(official_bert.BertLayer):
    """A layer that reads its memory only in the mode "multimodal", as BLIP's do."""

    def forward(
        self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, mode=None
    ):
        if mode != "multimodal":
            x = self.attention(hidden_states, attention_mask)[0]
        else:
            x = self.attention(hidden_states, attention_mask)[0]
            x = self.crossattention(x, None, None, encoder_hidden_states, encoder_attention_mask)[0]
        return self.output(self.intermediate(x), x)


def test_modes_of_other_models():
    module = randomised(ModalLayer(config(num_hidden_layers=3, num_uni_layer=2, add_cross_attention=True), 0))
    x, memory = torch.randn(2, 4, 128), torch.randn(2, 6, 128)
    mask, memory_mask = torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 6)
    mask[0, ..., -1], memory_mask[1, ..., 3:] = -10000.0, -1e9
    calls = [{}, {"mode": None}, {"mode": "text"}, {"mode": "multimodal"}]
    calls = [{**call, "encoder_hidden_states": memory, "encoder_attention_mask": memory_mask} for call in calls]
    expected = [module(x, mask, **call) for call in calls]
    assert relative_error(expected[3], expected[2]) > 0.01
    assert reason(module) == ""
    for call, out in zip(calls, expected, strict=True):
        assert relative_error(module(x, mask, **call), out) < 1e-5


def test_unserved_calls_of_a_layer():
    module, x = layer(), torch.randn(2, 4, 128)
    past = tuple(torch.randn(2, 2, 3, 64) for _ in range(2))
    calls = {
        "output_attentions": {"output_attentions": True},
        "past_key_value": {"past_key_value": past},
        "head_mask": {"head_mask": torch.ones(2, 1, 1)},
        "an unknown attention mask": {"attention_mask": torch.zeros(1, 4)},
        "hides all keys": {"attention_mask": torch.full((2, 1, 1, 4), -10000.0)},
        "in an unknown way: no memory, mode fusion": {"mode": "fusion"},
    }
    expected = {why: module(x, **call) for why, call in calls.items()}
    mf.accelerate(module)
    for why, call in calls.items():
        with pytest.warns(RuntimeWarning, match=why):
            actual = module(x, **call)
        assert all(relative_error(a, e) < 1e-5 for a, e in zip(actual, expected[why], strict=True))


@pytest.mark.parametrize(
    "mask",
    [
        torch.randn(2, 1, 4, 4),
        torch.randn(1, 2, 4, 4),
        torch.zeros(2, 1, 4, 4).masked_fill(torch.eye(4) > 0, -1e4),
    ],
    ids=["biases", "a bias for each head", "any pattern"],
)
def test_masks_of_any_values(mask):
    module, x = layer(), torch.randn(2, 4, 128)
    expected = module(x, mask)
    assert reason(module) == ""
    for actual, out in zip(module(x, mask), expected, strict=True):
        assert relative_error(actual, out) < 1e-5


def test_unsupported_layers():
    relative = layer()
    relative.attention.self.position_embedding_type = "relative_key"
    relative.attention.self.distance_embedding = nn.Embedding(127, 64)
    assert reason(relative) == "attention.self has relative position embeddings (relative_key)"
    assert hasattr(relative.output.dense, STATE)
    assert not hasattr(relative.attention, STATE)

    tanh = layer()
    tanh.intermediate.intermediate_act_fn = lambda x: F.gelu(x, approximate="tanh")
    assert reason(tanh) == "its activation is none of quick_gelu, gelu"
    assert hasattr(tanh.attention, STATE)

    class PreNorm(official_bert.BertLayer):
        def forward(self, hidden_states, attention_mask=None):
            return super().forward(self.output.LayerNorm(hidden_states), attention_mask)

    class Nameless(official_bert.BertLayer):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    settings = config(num_hidden_layers=3)
    assert reason(PreNorm(settings, 0)) == "on a trial input it computes something other than a BERT layer"
    assert reason(Nameless(settings, 0)) == "its forward takes arguments without names"

    class Scaled(official_bert.BertSelfAttention):
        def transpose_for_scores(self, x):
            return 1.001 * super().transpose_for_scores(x)

    scaled = layer()
    scaled.attention.self = Scaled(config(), False)
    assert reason(scaled) == "on a trial input it computes something other than a BERT layer"
    scaled = layer()
    scaled.attention.self = Scaled(config(), False)
    assert reason(scaled, "attention") == "on a trial input it computes something other than BERT's attention"


@pytest.mark.parametrize("cross", [False, True])
def test_attention_alone(cross):
    module = nn.ModuleDict({"a": randomised(official_bert.BertAttention(config(encoder_width=96), cross))})
    x, memory = torch.randn(2, 4, 128), torch.randn(2, 6, 96)
    call = {"encoder_hidden_states": memory, "encoder_attention_mask": torch.zeros(2, 1, 1, 6)} if cross else {}
    expected = module["a"](x, **call)
    assert mf.accelerate(module).entries[0].replacement == "FastBertAttention"
    out, (key, value) = module["a"](x, **call)
    assert relative_error(out, expected[0]) < 1e-5
    assert relative_error(key, expected[1][0]) < 1e-5
    assert relative_error(value, expected[1][1]) < 1e-5


def test_attention_of_the_reference_alone():
    attention = pair(SMALL)[0].text_decoder.bert.encoder.layer["0"].attention
    x, memory = torch.randn(2, 4, 64), torch.randn(2, 6, 64)
    expected = attention(x, x, None), attention(x, memory, None)
    assert reason(attention) == ""
    assert relative_error(attention(x, x, None), expected[0]) < 1e-5
    assert relative_error(attention(x, memory, None), expected[1]) < 1e-5


@pytest.mark.parametrize("stride", [1, 2, 1000])
def test_fusion_layers(stride):
    module = randomised(official_bert.FusionLayer(config(stride_layer=stride)))
    x, memory = torch.randn(2, 4, 128), torch.randn(2, 6, 128)
    mask, memory_mask = torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 6)
    mask[0, ..., -1], memory_mask[1, ..., 3:] = -10000.0, -1e9
    expected = [module(x, mask, None, memory, memory_mask, place) for place in range(3)]
    assert reason(module) == ""
    for place, outputs in enumerate(expected):
        for actual, out in zip(module(x, mask, None, memory, memory_mask, place), outputs, strict=True):
            assert relative_error(actual, out) < 1e-5


def test_saved_attention_weights():
    module = layer(1)
    mf.accelerate(module)
    module.crossattention.self.save_attention = True
    with pytest.warns(RuntimeWarning, match="save_attention"):
        module(torch.randn(2, 4, 128), encoder_hidden_states=torch.randn(2, 5, 128), mode="v_module")
    assert module.crossattention.self.attention_map.shape == (2, 2, 50, 5)


# --- hooks, replaced parts, other instances


def test_a_hook_on_a_part_is_called():
    model, video = pair(SMALL)[0], random_video(SMALL, 1)
    part = model.visual_encoder.visual.transformer.resblocks[0].mlp.c_fc
    seen = []
    handle = part.register_forward_hook(lambda *_: seen.append(1))
    report = mf.accelerate(model)
    path = "visual_encoder.visual.transformer.resblocks"
    outcomes = {entry.path: entry for entry in report.entries}
    assert outcomes[f"{path}.0"].reason == "mlp.c_fc has a hook or its own forward"
    assert outcomes[f"{path}.1"].replacement == "FastTemporalBlock"
    assert outcomes[f"{path}.0.attn"].replacement == "FastMultiheadAttention"
    model.encode_video(video)
    assert seen == [1]
    handle.remove()
    assert mf.accelerate(model)
    outcomes = {entry.path: entry for entry in mf.accelerate(model).entries}
    assert outcomes[f"{path}.0"].reason == "parts of it are accelerated already; call restore first"


def test_hooks_on_a_swapped_module():
    module, x = block(), torch.randn(5, 4, 64)
    expected = module(x, 2)
    module.register_forward_hook(lambda _, __, out: 2 * out)
    assert reason(module) == ""
    assert relative_error(module(x, 2), 2 * expected) < 1e-5


def test_global_hooks_are_called():
    module, x = block(), torch.randn(5, 4, 64)
    mf.accelerate(module)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        with pytest.warns(RuntimeWarning, match="global module hooks"):
            module(x, 2)
    finally:
        handle.remove()
    assert module.mlp.c_fc in seen


def test_a_forward_on_the_instance():
    module = block()
    module.forward = lambda x, T: x
    assert reason(module) == "its forward is replaced on the instance in an unknown way"
    x = torch.randn(5, 4, 64)
    assert module(x, 2) is x


def test_a_decoder_with_unknown_layers():
    model = pair(SMALL)[0]
    for made in model.text_decoder.bert.encoder.layer.values():
        made.adapter = nn.Linear(64, 64)
    outcomes = {entry.path: entry for entry in mf.accelerate(model).entries}
    assert outcomes["text_decoder"].reason == "none of its layers is known"
    assert outcomes["text_decoder.bert.encoder.layer.0"].reason == "it has an unknown part: adapter"
    assert outcomes["text_decoder.bert.encoder.layer.0.attention"].replacement == "FastBertAttention"


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_fast_modules_are_left():
    report = mf.accelerate(nn.ModuleDict({"a": mf.nn.LayerNorm(8), "b": torch.jit.script(nn.LayerNorm(8))}))
    assert [entry.reason for entry in report.entries] == ["it is a fast module", "it is compiled by TorchScript"]


def test_nothing_to_do():
    assert str(mf.accelerate(nn.ReLU())) == ""
    report = mf.accelerate(nn.LayerNorm(8))
    assert str(report) == "(the model)  LayerNorm  → FastLayerNorm"
