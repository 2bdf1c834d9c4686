"""Configurations: presets, official files, and impossible values."""

import pytest

import mplug2_fast as mf
from mplug2_fast.models.config import GenerationConfig


@pytest.mark.parametrize("name", ["large", "base", "tiny"])
def test_presets_survive_a_round_trip(name):
    config = mf.MPlug2Config.preset(name)
    assert mf.MPlug2Config.from_dict(config.to_dict()) == config


def test_large_is_the_released_large():
    config = mf.MPlug2Config.preset("large")
    assert (config.vision.num_heads, config.vision.num_patches, config.text.head_dim) == (16, 256, 64)


def test_the_clip_sizes_follow_from_the_released_name():
    bert = {"hidden_size": 768, "num_attention_heads": 12}
    config = mf.MPlug2Config.from_official(bert=bert, model={"clip_name": "ViT-B-16"})
    assert (config.vision.width, config.vision.layers, config.vision.patch_size) == (768, 12, 16)
    assert config.text.stored_layers == 24


@pytest.mark.parametrize(("prompt", "tokens"), [("", 0), ("clip", 0), ("a video of", 2), ("what's shown here:", 5)])
def test_prompt_tokens_are_all_but_the_last(prompt, tokens):
    assert GenerationConfig(prompt=prompt).prompt_tokens == tokens
    assert mf.MPlug2Config.preset("large").replace(prompt=prompt).generation.prompt_tokens == tokens
    assert GenerationConfig(prompt=prompt, prompt_length=9).prompt_tokens == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 100}, "vision width 100"),
        ({"num_attention_heads": 3}, "num_attention_heads 3"),
        ({"image_size": 225}, "use 224"),
        ({"temporal_kernel_size": 2}, "odd"),
        ({"num_uni_layer": 13}, "num_uni_layer 13"),
        ({"fusion_layers": 30}, "fusion_layers 30"),
        ({"text_encoder_layers": 1}, "text_encoder_layers 1"),
        ({"layers": 0}, "layers must be a positive whole number"),
        ({"no_such_field": 1}, "no_such_field"),
    ],
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(mf.ConfigError, match=message):
        mf.MPlug2Config.preset("large").replace(**changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mf.MPlug2Config.preset("huge"), "large, base, tiny"),
        (lambda: mf.MPlug2Config.from_dict({"vision": {"widht": 3}}), "vision.widht"),
        (lambda: mf.MPlug2Config.from_official(bert={}, model={"clip_name": "RN50"}), "RN50"),
        (lambda: mf.MPlug2Config.from_official(bert={}, clip={"width": 64}), "clip lacks layers, patch"),
    ],
)
def test_bad_sources_are_named(call, message):
    with pytest.raises(mf.ConfigError, match=message):
        call()


def test_public_names_are_all_there():
    for name in mf.__all__:
        assert getattr(mf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mf.nonsense  # noqa: B018


def test_a_field_of_two_parts_is_never_guessed():
    config = mf.MPlug2Config.preset("tiny")
    with pytest.raises(mf.ConfigError, match=r"layer_norm_eps is a field of vision and text: use vision=\{"):
        config.replace(layer_norm_eps=1e-6)
    changed = config.replace(text={"layer_norm_eps": 1e-6}, num_frames=2)
    assert (changed.text.layer_norm_eps, changed.vision.layer_norm_eps) == (1e-6, config.vision.layer_norm_eps)
    assert changed.vision.num_frames == 2
    with pytest.raises(mf.ConfigError, match=r"no such configuration field: text.num_frames"):
        config.replace(text={"num_frames": 2})
