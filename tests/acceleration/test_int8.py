"""Accelerated models with 8-bit weights: errors, weights that change, and what undoes them."""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mplug2_fast as mf
from mplug2_fast.acceleration import int8
from mplug2_fast.errors import ConfigError
from mplug2_fast.ops.runtime import cpu, onednn
from tests.acceleration.test_transformers import bert, made, models, transformers, words  # noqa: F401
from tests.golden.cases import relative_error
from tests.tiny import SMALL, pair, random_text, random_video

TOLERANCE = 3e-2
HAS_PRODUCTS = cpu.multiplies_bytes() and onednn.multiplies(torch.bfloat16)


@pytest.fixture(autouse=True)
def on_any_processor(native_module, monkeypatch):
    """The kernels compute the same on all processors."""
    monkeypatch.setattr(cpu, "multiplies_bytes", lambda: True)


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval()


X = torch.randn(70, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(module, x=X):
    return module(x)


def products(report):
    return sum(calls.int8 for calls in report.calls.values())


def traces(model):
    return [name for module in model.modules() for name in vars(module) if name.startswith("_mplug2_fast")]


# --- errors


@pytest.mark.unserved_calls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "config", "inputs"), [pytest.param(*m[1:], id=m[0]) for m in models()])
def test_models_of_transformers(name, config, inputs, dtype):
    model = made(name, config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)  # biases and norms too
        expected = model(**inputs)
        report = mf.accelerate(model.to(dtype), dtype="int8")
        found = model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    assert products(report) > 8
    for key, value in expected.items():
        if torch.is_tensor(value) and value.is_floating_point() and value.numel() > 1:
            assert relative_error(found[key], value) < TOLERANCE, key


@pytest.mark.parametrize("task", ["captioning", "question_answering"])
def test_the_reference_model(task):
    model, video, ids = pair(SMALL, task)[0], random_video(SMALL, 2), random_text(SMALL, 2, 7)
    question = () if task == "captioning" else random_text(SMALL, 2, 6)

    @torch.no_grad()
    def compute():
        embeds = model.encode_video(video)
        memory, mask = (embeds, None) if not question else model.encode_question(video, *question)
        return embeds, memory, model.text_decoder(*ids, memory, mask)

    before = compute()
    report = mf.accelerate(model, dtype="int8")
    for actual, expected in zip(compute(), before, strict=True):
        assert 1e-5 < relative_error(actual, expected) < TOLERANCE
    block = report.calls["visual_encoder.visual.transformer.resblocks.0"]
    assert block.int8 == 8 * block.served  # two products each of attention, the MLP and both local temporal modules
    assert not block.wide


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("own", [True, False], ids=["own keys", "others' keys"])
def test_multi_head_attention(own, batch_first):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=batch_first).eval()
    x = torch.randn(3, 5, 32)
    y = x if own else torch.randn(3 if batch_first else 7, 7 if batch_first else 5, 32)
    with torch.no_grad():
        expected = attention(x, y, y, need_weights=False)[0]
        report = mf.accelerate(attention, dtype="int8")
        assert 1e-4 < relative_error(attention(x, y, y, need_weights=False)[0], expected) < TOLERANCE
    assert report.calls[""].int8 == (2 if own else 3)


# --- weights


def write_data(weight):
    weight.data *= -1.5


def write_numpy(weight):
    weight.detach().numpy()[3] = 7


def write_assigned(module):
    module.load_state_dict({k: v * 0.7 for k, v in module.state_dict().items()}, assign=True)


@pytest.mark.parametrize("write", [write_data, write_numpy])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_results_belong_to_the_present_weights(mlp, write, place):
    mf.accelerate(mlp, dtype="int8")
    before = run(mlp)
    write(mlp[place].weight)
    fresh = copy.deepcopy(mlp)
    assert torch.equal(run(mlp), run(fresh))
    assert not torch.equal(run(mlp), before)


def test_new_parameters(mlp):
    mf.accelerate(mlp, dtype="int8")
    run(mlp)
    write_assigned(mlp)
    fresh = copy.deepcopy(mlp)
    mf.restore(fresh)
    expected = run(fresh)
    mf.accelerate(fresh, dtype="int8")
    assert torch.equal(run(mlp), run(fresh))
    assert relative_error(run(mlp), expected) < TOLERANCE


def test_other_dtypes(mlp):
    expected = run(mlp)
    report = mf.accelerate(mlp, dtype="int8")
    run(mlp)
    assert relative_error(run(mlp.bfloat16(), X.bfloat16()), expected) < TOLERANCE
    assert products(report) == 4
    run(mlp.double(), X.double())
    assert report.calls["1"].wide == {"a weight of torch.float64 and an input of torch.float64": 1}


def test_weights_are_rounded_once(mlp, monkeypatch):
    rounded = []
    monkeypatch.setattr(int8, "quantise_weight", lambda w: rounded.append(1) or _round(w))
    mf.accelerate(mlp, dtype="int8")
    for _ in range(3):
        run(mlp)
    assert len(rounded) == 2


_round = int8.quantise_weight


def test_state_dict_and_restore(mlp):
    before, state = run(mlp), copy.deepcopy(mlp.state_dict())
    mf.accelerate(mlp, dtype="int8")
    assert not torch.equal(run(mlp), before)
    assert mlp.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in mlp.state_dict().items())
    mf.restore(mlp)
    assert torch.equal(run(mlp), before)
    assert traces(mlp) == []


def test_restore_leaves_no_traces_in_a_whole_model():
    model = pair(SMALL)[0]
    mf.accelerate(model, dtype="int8")
    assert traces(model)
    mf.restore(model)
    assert traces(model) == []


def test_contexts(mlp):
    wide = mf.accelerate(mlp)
    expected = run(mlp)
    with mf.accelerated(mlp, "int8") as report:
        assert report.entries[-1].reason == "already; 8-bit weights"
        assert not torch.equal(run(mlp), expected)
        inside = run(mlp)
        with mf.accelerated(mlp, "int8"):
            pass
        assert torch.equal(run(mlp), inside)
    assert torch.equal(run(mlp), expected)
    assert wide.calls["1"].int8 == 3
    mf.restore(mlp)
    with mf.accelerated(mlp, "int8"):
        run(mlp)
    assert traces(mlp) == []


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_start_without_8_bit_weights(mlp, way):
    mf.accelerate(mlp, dtype="int8")
    expected = run(mlp)
    if way == "deepcopy":
        other = copy.deepcopy(mlp)
    else:
        stream = io.BytesIO()
        torch.save(mlp, stream)
        assert stream.tell() < sum(4 * p.numel() for p in mlp.parameters()) + 20_000
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    assert torch.equal(run(other), expected)
    again = mf.accelerate(other)
    assert again.calls["1"].int8 == 1  # counted in the copy


# --- which calls and layers


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.train(), "in training mode"),
        (lambda m: m.float().to(torch.float64), "a weight of torch.float64 and an input of torch.float32"),
    ],
)
def test_reasons_of_wide_products(change, reason):
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    report = mf.accelerate(model, dtype="int8")
    change(model)
    if "float64" in reason:
        with pytest.raises(RuntimeError, match="dtype"):  # as the original
            run(model)
    else:
        assert torch.equal(run(model), F.linear(X, model[0].weight, model[0].bias))
    assert report.calls["0"].wide == {reason: 1}
    assert reason in str(report)


def test_gradients_are_those_of_the_wide_weights(mlp):
    other = copy.deepcopy(mlp)
    report = mf.accelerate(mlp, dtype="int8")
    for model in (mlp, other):
        model(X).square().sum().backward()
    for (name, parameter), expected in zip(mlp.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)
    assert products(report) == 0
    mlp.requires_grad_(False)
    assert relative_error(mlp(X), other(X)) < TOLERANCE
    assert products(report) == 2


def test_a_block_with_gradients_computes_wide_products():
    """It is faster in training, so it runs."""
    model, video = pair(SMALL)[0].eval(), random_video(SMALL, 1)
    expected = model.encode_visual(video)
    report = mf.accelerate(model, dtype="int8")
    out = model.encode_visual(video)
    assert relative_error(out, expected) < 1e-5
    out.sum().backward()
    assert report.calls["visual_encoder.visual.transformer.resblocks.0"].wide == {"gradients": 8}


def test_autocast(mlp):
    report = mf.accelerate(mlp, dtype="int8")
    with torch.autocast("cpu", torch.bfloat16):
        assert run(mlp).dtype is torch.bfloat16
    assert report.calls["1"].wide == {"autocast": 1}


@pytest.mark.real_sizes
def test_small_calls_are_wide():
    model = nn.Sequential(nn.Linear(512, 512)).eval()
    report = mf.accelerate(model, dtype="int8")
    run(model, torch.randn(63, 512))
    assert (report.calls["0"].no_gain, report.calls["0"].int8) == (1, 0)
    run(model, torch.randn(64, 512))
    assert (report.calls["0"].served, report.calls["0"].int8) == (1, 1)


def test_words_are_scored_with_wide_weights():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = made("BertForMaskedLM", config)
    report = mf.accelerate(model, dtype="int8")
    head = next(e for e in report.entries if e.path == "cls.predictions.decoder")
    assert head.reason == "kept wide: it scores words"


def test_keep(mlp):
    report = mf.accelerate(mlp, dtype="int8", keep=["1"])
    assert {e.path: e.reason for e in report.replaced} == {"0": "", "1": "kept wide", "3": "8-bit weights"}
    run(mlp)
    assert (report.calls["1"].int8, report.calls["3"].int8) == (0, 1)
    with pytest.raises(ConfigError, match=r"^3 has an 8-bit weight already: call mplug2_fast\.restore first$"):
        mf.accelerate(mlp, dtype="int8", keep=["1", "3"])
    run(mlp)
    assert report.calls["3"].int8 == 2


def test_keep_one_layer_of_a_fused_module():
    model, video = pair(SMALL)[0], random_video(SMALL, 1)
    blocks = "visual_encoder.visual.transformer.resblocks"
    with torch.no_grad():
        expected = model.encode_visual(video)
        report = mf.accelerate(
            model, dtype="int8", keep=[f"{blocks}.0.mlp.c_fc", f"{blocks}.0.attn.in_proj", f"{blocks}.0.lmhra1"]
        )
        assert relative_error(model.encode_visual(video), expected) < TOLERANCE
    assert report.calls[f"{blocks}.0"].int8 == 4
    assert report.calls[f"{blocks}.1"].int8 == 8


def test_the_report(words):  # noqa: F811
    model = bert()
    report = mf.accelerate(model, dtype="int8")
    assert "encoder.layer.{0..1}" in str(report)
    run(lambda _: model(**words))
    line = next(line for line in str(report).splitlines() if line.startswith("encoder.layer"))
    assert line.endswith("→ FastBertLayer (8-bit weights; served 1, 8-bit products 6)")


@pytest.mark.real_sizes
@pytest.mark.skipif(not HAS_PRODUCTS, reason="the page shows a processor that multiplies bytes")
def test_the_example_of_the_page(capsys):
    page = (Path(__file__).parents[2] / "docs/acceleration.md").read_text(encoding="utf-8")
    code, output = re.search(r"^```py\n(.*?)^```\n\n^```\n(.*?)^```\n", page, re.DOTALL | re.MULTILINE).groups()
    exec(compile(code, "<docs>", "exec"), {"__name__": "__docs__"})
    assert capsys.readouterr().out == output


# --- smoothing


def test_outliers_of_a_norm_are_smoothed(mlp, monkeypatch):
    with torch.no_grad():
        mlp[0].weight[::16] *= 30
    expected, errors = run(mlp), []
    for feeds in (int8.feeds, lambda norm: None):
        monkeypatch.setattr(int8, "feeds", feeds)
        with mf.accelerated(mlp, "int8"):
            errors.append(relative_error(run(mlp), expected))
    assert errors[0] < 0.6 * errors[1], errors


def test_bert_is_smoothed(words):  # noqa: F811
    """Norms inside a replaced layer mark their results too."""
    model = bert()
    mf.accelerate(model, dtype="int8")
    run(lambda _: model(**words))
    layer = model.encoder.layer[1]
    for part in (layer.attention.self.query, layer.intermediate.dense):
        (copied,) = vars(part)["_mplug2_fast_int8"]._copies.values()
        assert copied.inverse is not None


def test_results_have_no_marks_when_they_are_stored(mlp):
    mf.accelerate(mlp, dtype="int8")
    out = run(mlp[0])
    assert int8.norm_of(out) is mlp[0]
    stream = io.BytesIO()
    torch.save(out, stream)
    stream.seek(0)
    for each in (torch.load(stream, weights_only=False), copy.deepcopy(out)):
        assert int8.norm_of(each) is None


# --- bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "int4"},
            r"^accelerate rounds weights to int8 only, got the dtype int4: use model.to\(\) for others$",
        ),
        ({"dtype": torch.bfloat16}, "got the dtype bfloat16"),
        ({"keep": ["1"]}, "^keep names layers that are not rounded to 8 bits: use it with the dtype int8$"),
        ({"dtype": "int8", "keep": "1"}, r"^keep is a list of patterns: pass \['1'\]$"),
        ({"dtype": "int8", "keep": ["5"]}, "^keep '5' matches no layer: one of the 2 layers is 3$"),
    ],
)
def test_bad_arguments(mlp, options, message):
    with pytest.raises(ConfigError, match=message):
        mf.accelerate(mlp, **options)
    assert traces(mlp) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(4, 4).half(), "the model: its weight is float16, not float32 or bfloat16"),
        (nn.LayerNorm(4), "^the model has no linear layer that can have 8-bit weights$"),
        (nn.Linear(70000, 1), "it has more than 65536 inputs"),
    ],
    ids=["float16", "no linear layer", "many inputs"],
)
def test_models_that_cannot_have_8_bit_weights(model, message):
    with pytest.raises(ConfigError, match=message):
        mf.accelerate(model, dtype="int8")
    assert traces(model) == []


def test_a_fast_model_rounds_itself():
    model = pair(SMALL)[1]
    with pytest.raises(ConfigError, match=r"^MPlug2\w* rounds its own weights: call its method quantise instead$"):
        mf.accelerate(model, dtype="int8")


def test_a_processor_without_products_of_bytes(mlp, monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bytes", lambda: False)
    with pytest.raises(ConfigError, match=r"8-bit weights would be slower here.*: leave out the dtype$"):
        mf.accelerate(mlp, dtype="int8")
