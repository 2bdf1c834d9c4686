from __future__ import annotations

import math
from collections import Counter

import pytest

import mplug2_fast as mf
from mplug2_fast.checkpoint import KeyKind, official_names

TASKS = ("captioning", "question_answering")


@pytest.mark.parametrize(
    ("task", "counts"),
    [("captioning", (180, 2, 193)), ("question_answering", (269, 2, 104))],
)
def test_every_golden_key_is_known(golden_shapes, golden_config, task, counts):
    keys = official_names(golden_config, task)
    kinds = Counter(keys.classify(key) for key in golden_shapes)
    assert (kinds[KeyKind.NEEDED], kinds[KeyKind.TIED], kinds[KeyKind.UNUSED]) == counts
    assert sum(counts) == len(golden_shapes)
    assert keys.needed.items() <= golden_shapes.items()


@pytest.mark.parametrize(("task", "parameters"), [("captioning", 621_853_498), ("question_answering", 1_031_533_370)])
def test_every_large_key_is_known(large_shapes, task, parameters):
    keys = official_names(mf.MPlug2Config.preset("large"), task)
    kinds = Counter(keys.classify(key) for key in large_shapes)
    assert kinds[KeyKind.UNEXPECTED] == kinds[KeyKind.MOMENTUM] == 0
    assert keys.needed.items() <= large_shapes.items()
    assert sum(map(math.prod, keys.needed.values())) == parameters


def test_momentum_copies_are_known(golden_shapes, golden_config):
    trees = ("visual_encoder", "text_encoder", "fusion_encoder", "text_decoder", "visn_emb_norm")
    for task in TASKS:
        keys = official_names(golden_config, task)
        for key in golden_shapes:
            tree, rest = key.split(".", 1)
            assert tree in trees
            assert keys.classify(f"{tree}_m.{rest}") is KeyKind.MOMENTUM


@pytest.mark.parametrize(
    "key",
    [
        "head.weight",
        "visual_encoder_m.head.weight",
        "visual_encoder.visual.temporal_embedding",
        "visual_encoder.visual.transformer.resblocks.2.ln_1.weight",
        "visual_encoder.visual.transformer.resblocks.0.lmhra3.ln.weight",
        "text_encoder.pooler.dense.weight",
        "text_encoder.encoder.layer.4.output.dense.weight",
        "text_encoder.encoder.layer.1.crossattention.self.query.weight",
        "text_encoder.encoder.layer.1.output_vision.dense.weight",
        "text_encoder.encoder.layer.3.latents",
        "fusion_encoder.encoder.layer.4.output.dense.weight",
        "fusion_encoder.encoder.layer.0.output_vision.dense.weight",
        "text_decoder.bert.encoder.layer.2.output.dense.weight",
        "text_decoder.bert.encoder.layer.1.latents",
        "text_decoder.bert.embeddings.word_embeddings.bias",
    ],
)
def test_foreign_keys_are_unexpected(golden_config, key):
    assert official_names(golden_config, "question_answering").classify(key) is KeyKind.UNEXPECTED


def test_captioning_takes_any_fusion_encoder(golden_config):
    key = "fusion_encoder.encoder.layer.23.output.dense.weight"
    assert official_names(golden_config, "captioning").classify(key) is KeyKind.UNUSED


def test_projection_exists_only_between_different_widths(golden_config):
    assert not any(key.startswith("visn_fc") for key in official_names(golden_config, "captioning").needed)
    needed = official_names(golden_config.replace(width=192), "captioning").needed
    assert needed["visn_fc.weight"] == (128, 192)
    assert needed["visn_layer_norm.bias"] == (128,)


def test_temporal_downsampling_has_a_kernel_over_frames(golden_config):
    needed = official_names(golden_config.replace(temporal_downsampling=True), "captioning").needed
    assert needed["visual_encoder.visual.conv1.weight"] == (128, 3, 3, 14, 14)


def test_unknown_task_is_refused(golden_config):
    with pytest.raises(mf.ConfigError, match="poetry"):
        official_names(golden_config, "poetry")


@pytest.mark.parametrize("implementation", ["fast", "reference"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "width": 192,
            "temporal_downsampling": True,
            "temporal_kernel_size": 5,
            "temporal_reduction": 4,
            "mlp_ratio": 2,
        },
        {"fusion_layers": 4, "stride_layer": 2, "text_encoder_layers": 5, "text_decode_layers": 3, "num_latents": 7},
    ],
    ids=["golden", "vision", "text"],
)
def test_models_hold_exactly_the_needed_keys(golden_config, changes, task, implementation):
    config = golden_config.replace(**changes)
    models = mf if implementation == "fast" else mf.reference
    kind = models.MPlug2ForCaptioning if task == "captioning" else models.MPlug2ForQuestionAnswering
    model = kind(config, device="meta")
    views = model.official_parameters()
    assert {key: tuple(view.shape) for key, view in views.items()} == official_names(config, task).needed
    assert sum(view.numel() for view in views.values()) == sum(p.numel() for p in model.parameters())
