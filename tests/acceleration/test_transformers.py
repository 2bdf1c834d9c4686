"""Accelerated models of transformers: equal results, and a report of what computed them."""

import copy
import inspect
import json

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast.acceleration import swap
from tests.golden.cases import relative_error

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}


def made(name, config, **options):
    torch.manual_seed(0)
    return getattr(transformers, name)(config, **options).eval()


def bert(**options):
    return made("BertModel", transformers.BertConfig(vocab_size=50, **SIZES, **options), add_pooling_layer=False)


def decoder():
    config = transformers.BertConfig(vocab_size=50, is_decoder=True, pad_token_id=0, **SIZES)
    return made("BertLMHeadModel", config)


@pytest.fixture
def words():
    ids = torch.randint(5, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def compare(model, **inputs):
    """Compares a call before and after accelerating, and returns the report."""
    expected = model(**inputs)
    report = mf.accelerate(model)
    found = model(**inputs)
    for name, value in expected.items():
        if torch.is_tensor(value):
            assert relative_error(found[name], value) < 1e-5, name
    return report


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_bert(words, attention, padded):
    if not padded:
        del words["attention_mask"]
    report = compare(bert(attn_implementation=attention), **words)
    assert [report.calls[f"encoder.layer.{i}"].served for i in range(2)] == [1, 1]


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_is_causal_with_any_mask(words, padded):
    if not padded:
        del words["attention_mask"]
    report = compare(decoder(), **words, use_cache=False)
    assert report.calls["bert.encoder.layer.0"].served == 1


@pytest.mark.unserved_calls
def test_generation_with_a_cache(words):
    model = decoder()
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    expected = model.generate(**words, **options)
    report = mf.accelerate(model)
    assert torch.equal(model.generate(**words, **options), expected)
    layer = report.calls["bert.encoder.layer.0"]
    assert layer.served == 0
    assert layer.by_parts.total() == report.calls["bert.encoder.layer.0.intermediate.dense"].served > 0


@pytest.mark.unserved_calls
def test_arguments_that_were_refused_before_are_refused_at_once(monkeypatch, words):
    model = decoder()
    report, layer, looks = mf.accelerate(model), model.bert.encoder.layer[0], []
    monkeypatch.setattr(swap, "_require_intact", lambda module, _: looks.append(module))
    with torch.no_grad():
        for _ in range(3):
            model(**words, use_cache=True)
        assert looks.count(layer) == 1
        assert report.calls["bert.encoder.layer.0"].by_parts.total() == 3
        model(**words, use_cache=False)
    assert report.calls["bert.encoder.layer.0"].served == 1


def test_dtypes(words):
    model = bert().bfloat16()
    exact = copy.deepcopy(model).float()(**words).last_hidden_state
    with torch.no_grad():
        before = relative_error(model(**words).last_hidden_state, exact)
        mf.accelerate(model)
        found = model(**words).last_hidden_state
    assert found.dtype is torch.bfloat16
    assert relative_error(found, exact) < 1.5 * before


@pytest.mark.unserved_calls
def test_attentions_and_hidden_states(words):
    model = bert(attn_implementation="eager")
    asked = {**words, "output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        expected = model(**asked)
        mf.accelerate(model)
        found = model(**asked)
    for name in ("attentions", "hidden_states"):
        assert len(found[name]) == len(expected[name]) > 0
        assert all(relative_error(a, e) < 1e-5 for a, e in zip(found[name], expected[name], strict=True))


def pixels(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def models():
    yield "vit", "ViTModel", lambda: transformers.ViTConfig(**VISION), {"pixel_values": pixels(2, 3, 16, 16)}
    yield (
        "videomae",
        "VideoMAEModel",
        lambda: transformers.VideoMAEConfig(num_frames=4, **VISION),
        {"pixel_values": pixels(1, 4, 3, 16, 16)},
    )
    yield (
        "timesformer",
        "TimesformerModel",
        lambda: transformers.TimesformerConfig(num_frames=2, **VISION),
        {"pixel_values": pixels(1, 2, 3, 16, 16)},
    )
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 49}
    ids = torch.randint(5, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    both = {"pixel_values": pixels(2, 3, 16, 16), "input_ids": ids, "attention_mask": mask}
    yield (
        "clip",
        "CLIPModel",
        lambda: transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16),
        both,
    )
    blip = {"pad_token_id": 0, "bos_token_id": 1, "sep_token_id": 2, **text, "encoder_hidden_size": 32}
    yield (
        "blip",
        "BlipForConditionalGeneration",
        lambda: transformers.BlipConfig(text_config=blip, vision_config=VISION),
        both,
    )
    yield "git", "GitForCausalLM", lambda: transformers.GitConfig(vision_config=VISION, **text), both


@pytest.mark.unserved_calls
@pytest.mark.parametrize(("name", "config", "inputs"), [pytest.param(*m[1:], id=m[0]) for m in models()])
def test_models(name, config, inputs):
    model = made(name, config())
    report = compare(model, **inputs)
    assert sum(calls.served for calls in report.calls.values()) > 0
    if hasattr(model, "generate"):
        options = {"max_new_tokens": 4, "do_sample": False, **inputs}
        found = model.generate(**options)
        mf.restore(model)
        assert torch.equal(found, model.generate(**options))


@pytest.mark.unserved_calls
def test_signature_and_saved_config_stay(tmp_path, words):
    model = decoder()
    names = list(inspect.signature(model.forward).parameters)
    mf.accelerate(model)
    assert list(inspect.signature(model.forward).parameters) == names
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertLMHeadModel"]
    again = transformers.BertLMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert relative_error(again(**words).logits, model(**words).logits) < 1e-5


def test_training_with_gradient_checkpointing(words):
    plain = bert()
    fast = copy.deepcopy(plain)
    mf.accelerate(fast)
    found = []
    for model in (plain, fast):
        model.gradient_checkpointing_enable()
        model.train()
        torch.manual_seed(0)
        model(**words).last_hidden_state.square().mean().backward()
        found.append(model.encoder.layer[0].attention.self.query.weight.grad)
    assert relative_error(found[1], found[0]) < 1e-4
