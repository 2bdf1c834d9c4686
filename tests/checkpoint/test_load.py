from __future__ import annotations

import re

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast.checkpoint.load import _PIECE, copy_official

POSITIONS = "visual_encoder.visual.positional_embedding"


def build(task, config, implementation="fast", **options):
    models = mf if implementation == "fast" else mf.reference
    kind = models.MPlug2ForCaptioning if task == "captioning" else models.MPlug2ForQuestionAnswering
    return kind(config, **options)


@pytest.mark.parametrize("implementation", ["fast", "reference"])
@pytest.mark.parametrize("task", ["captioning", "question_answering"])
@pytest.mark.parametrize("form", ["tensors", "arrays", "prefixed"])
def test_round_trip_is_exact(golden_weights, golden_config, task, implementation, form):
    model = build(task, golden_config, implementation)
    given = golden_weights
    if form == "arrays":
        given = {key: tensor.numpy() for key, tensor in given.items()}
        for array in given.values():
            array.flags.writeable = False
    elif form == "prefixed":
        given = {f"module.module.{key}": tensor for key, tensor in given.items()}
    fit = mf.load_released(model, given)
    saved = mf.released_state_dict(model)
    assert sorted(saved) == sorted(fit.needed)
    for key, tensor in saved.items():
        assert torch.equal(tensor, golden_weights[key]), key
    assert len(fit.tied) == 2
    assert not fit.resized


def test_saved_tensors_are_copies(golden_weights, golden_config):
    model = build("captioning", golden_config)
    mf.load_released(model, golden_weights)
    for tensor in mf.released_state_dict(model).values():
        tensor.zero_()
    assert torch.equal(model.official_parameters()[POSITIONS], golden_weights[POSITIONS])


def test_arrays_of_any_layout(golden_weights, golden_config):
    model = build("captioning", golden_config)
    given = {key: tensor.numpy() for key, tensor in golden_weights.items()}
    given = {
        key: array.astype(array.dtype.newbyteorder(">")) if array.ndim == 1 else array for key, array in given.items()
    }
    given = {key: array.astype("float64").copy(order="F") if array.ndim == 2 else array for key, array in given.items()}
    mf.load_released(model, given)
    for key, tensor in mf.released_state_dict(model).items():
        assert torch.equal(tensor, golden_weights[key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_to_the_models_dtype(golden_weights, golden_config, dtype):
    model = build("captioning", golden_config, dtype=dtype)
    mf.load_released(model, golden_weights)
    for key, tensor in mf.released_state_dict(model).items():
        assert torch.equal(tensor, golden_weights[key].to(dtype)), key


def refused(model, given) -> str:
    """The report of a refused load, which must leave the model as it was."""
    before = mf.released_state_dict(model)
    with pytest.raises(mf.CheckpointError) as caught:
        mf.load_released(model, given)
    for key, tensor in model.official_parameters().items():
        assert torch.equal(tensor, before[key]), key
    return str(caught.value)


def test_report_groups_everything_that_does_not_fit(golden_weights, golden_config):
    model = build("captioning", golden_config)
    given = {key: tensor for key, tensor in golden_weights.items() if ".lmhra1." not in key}
    given |= {f"head.layers.{i}.weight": torch.zeros(1) for i in range(5)}
    given["visn_emb_norm.weight"] = torch.zeros(7)
    report = refused(model, given)
    assert "does not fit a captioning model" in report
    assert "nothing was loaded" in report
    assert re.search(r"missing: 16 entries\n    visual_encoder\.visual\.transformer\.resblocks\.\* \(16\)", report)
    assert "and 13 more" in report
    assert re.search(r"unexpected: 5 entries\n    head\.layers\.\* \(5\)\n      head\.layers\.0\.weight\n", report)
    assert "of another shape: 1 entry" in report
    assert "visn_emb_norm.weight [7], needed [128]" in report
    assert "remedy: build the model with the sizes of this checkpoint" in report
    assert len(report.splitlines()) < 20


@pytest.mark.parametrize(
    "prefix", ["visn_emb_norm", "text_decoder.cls.predictions.bias", "visual_encoder.visual.ln_pre"]
)
def test_a_single_missing_entry_is_refused(golden_weights, golden_config, prefix):
    key = next(key for key in golden_weights if key.startswith(prefix))
    given = {name: tensor for name, tensor in golden_weights.items() if name != key}
    report = refused(build("captioning", golden_config), given)
    assert "missing: 1 entry" in report
    assert key in report
    assert "the file is incomplete" in report


def test_momentum_copies_are_left_alone(golden_weights, golden_config):
    given = dict(golden_weights)
    for key, tensor in golden_weights.items():
        tree, rest = key.split(".", 1)
        given[f"{tree}_m.{rest}"] = tensor + 1
    model = build("question_answering", golden_config)
    fit = mf.load_released(model, given)
    assert len(fit.momentum) == len(golden_weights)
    assert torch.equal(model.official_parameters()["visn_emb_norm.weight"], golden_weights["visn_emb_norm.weight"])


@pytest.mark.parametrize(
    "twin", ["text_decoder.cls.predictions.decoder.weight", "text_decoder.cls.predictions.decoder.bias"]
)
def test_twins_must_agree(golden_weights, golden_config, twin):
    changed = golden_weights[twin].clone()
    changed[3] += 1
    report = refused(build("captioning", golden_config), golden_weights | {twin: changed})
    assert f"{twin} differs from" in report
    without = {key: tensor for key, tensor in golden_weights.items() if key != twin}
    mf.load_released(build("captioning", golden_config), without)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visn_emb_norm.weight": torch.zeros(128, dtype=torch.int8)}, "not floating point"),
        ({"visn_emb_norm.weight": torch.zeros(128, device="meta")}, "has no values"),
        ({"visn_emb_norm.weight": "gone"}, "neither a tensor nor a NumPy array of numbers, but str"),
        ({"module.visn_emb_norm.weight": torch.zeros(128)}, "exists twice"),
        ({3: torch.zeros(128)}, "keys of a state dict must be names"),
        ({"model": {}}, "pass its 'model' entry"),
    ],
)
def test_entries_that_are_no_weights(golden_weights, golden_config, change, message):
    assert message in refused(build("captioning", golden_config), golden_weights | change)


def test_a_model_without_storage_is_refused(golden_weights, golden_config):
    with pytest.raises(mf.CheckpointError, match="to_empty"):
        mf.load_released(build("captioning", golden_config, device="meta"), golden_weights)


@pytest.mark.parametrize("implementation", ["fast", "reference"])
def test_positions_of_another_resolution_are_resized(golden_weights, golden_config, implementation):
    model = build("captioning", golden_config.replace(image_size=112), implementation)
    fit = mf.load_released(model, golden_weights)
    assert fit.resized == {POSITIONS: ((17, 128), (65, 128))}
    old, new = golden_weights[POSITIONS], model.official_parameters()[POSITIONS]
    assert torch.equal(new[0], old[0])
    # Twice the side: an inner pixel lies a quarter of the way from one old centre to the next.
    grid, resized = old[1:].view(4, 4, 128), new[1:].view(8, 8, 128)
    torch.testing.assert_close(resized[0, 0], grid[0, 0])
    torch.testing.assert_close(resized[7, 7], grid[3, 3])
    rows = 0.75 * grid[1] + 0.25 * grid[2]
    torch.testing.assert_close(resized[3, 5], 0.75 * rows[2] + 0.25 * rows[3])


def test_positions_of_another_width_are_not_resized(golden_weights, golden_config):
    report = refused(build("captioning", golden_config), golden_weights | {POSITIONS: torch.zeros(17, 64)})
    assert f"{POSITIONS} [17, 64], needed [17, 128]" in report


@pytest.mark.parametrize("position", [0, _PIECE - 1, _PIECE, -1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_numbers_are_checked_as_they_are_copied(position, value):
    weights = torch.zeros(2 * _PIECE + 5, dtype=torch.float64)
    weights[position] = value
    with pytest.raises(mf.CheckpointError, match=r"not finite|infinite in float32"):
        copy_official({"w": torch.empty(weights.shape)}, {"w": weights})


def test_large_numbers_are_finite_though_their_sum_is_not():
    weights, view = torch.full((_PIECE + 5,), 3e38), torch.empty(_PIECE + 5)
    copy_official({"w": view}, {"w": weights})
    assert torch.equal(view, weights)
