from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mplug2_fast as mf
from mplug2_fast.checkpoint import convert, official_names
from mplug2_fast.predict.predictor import TINY_MODEL
from mplug2_fast.tasks import Captioning, QuestionAnswering


def assert_holds(model, weights, dtype=torch.float32):
    views = model.official_parameters()
    assert views.keys() == official_names(model.config, model.task).needed.keys()
    for key, view in views.items():
        assert view.dtype == dtype
        assert torch.equal(view, weights[key].to(dtype)), key


def prefixed(weights, prefix="module."):
    return {f"{prefix}{key}": tensor for key, tensor in weights.items()}


def inside(weights, name, wrapper):
    """`name` is the module that is wrapped."""
    return {key.replace(f"{name}.", f"{name}.{wrapper}."): tensor for key, tensor in weights.items()}


def views(weights):
    """All in one storage."""
    floats = {key: tensor.float() for key, tensor in weights.items()}
    pieces = torch.cat([tensor.flatten() for tensor in floats.values()]).split([t.numel() for t in floats.values()])
    return {key: piece.view(weights[key].shape) for key, piece in zip(weights, pieces, strict=True)}


def transposed(tensor):
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor


FORMS = {
    "model": lambda w: {"model": w, "epoch": 1},
    "module": lambda w: {"module": w, "global_steps": 7, "args": argparse.Namespace(local_rank=0)},
    "prefixed": lambda w: {"model": prefixed(w)},
    "bare": lambda w: w,
    "bare prefixed": prefixed,
    "compiled": lambda w: prefixed(w, "_orig_mod."),
    "compiled in DDP": lambda w: {"model": prefixed(w, "_orig_mod.module.")},
    "DDP, compiled": lambda w: prefixed(w, "module._orig_mod."),
    "Lightning": lambda w: {"state_dict": prefixed(w, "model."), "callbacks": {}, "hyper_parameters": {"lr": 1e-4}},
    "Fabric": lambda w: {"state_dict": prefixed(w, "_forward_module.model.")},
    "FSDP": lambda w: inside(prefixed(w, "_fsdp_wrapped_module."), "resblocks.0", "_fsdp_wrapped_module"),
    "checkpointed": lambda w: inside(w, "resblocks.0", "_checkpoint_wrapped_module"),
    "FSDP, checkpointed": lambda w: inside(w, "layer.0", "_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "FairScale": lambda w: inside(w, "resblocks.1", "_fpw_module"),
    "peft": lambda w: inside(prefixed(w, "base_model.model."), "self.query", "base_layer"),
    "compiled block": lambda w: inside(w, "resblocks.1", "_orig_mod"),
    "with EMA": lambda w: {"model_ema": {k: v + 1 for k, v in w.items() if v.is_floating_point()}, "model": w},
    "with NumPy": lambda w: {
        "model": w,
        "cider": np.float64(1.2),
        "rng": (np.random.RandomState(0).get_state(), torch.get_rng_state()),
        "args": argparse.Namespace(output=Path("runs"), seen={1, 2}, blob=b"abc", big=bytearray(3)),
    },
    "parameters": lambda w: {k: nn.Parameter(v, requires_grad=False) for k, v in w.items()},
    "views": views,
    "transposed": lambda w: {key: transposed(tensor) for key, tensor in w.items()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_files(tmp_path, golden_weights, form, legacy):
    path = tmp_path / "checkpoint.pth"
    torch.save(FORMS[form](golden_weights), path, _use_new_zipfile_serialization=not legacy)
    assert_holds(mf.from_pretrained(path, task="captioning"), golden_weights)


def test_training_checkpoint(golden_file, golden_weights):
    model = mf.from_pretrained(golden_file)
    assert isinstance(model, mf.MPlug2ForQuestionAnswering)
    assert not model.training
    assert model.config.vision.num_frames == 4
    assert model.config.generation.num_beams == 3
    assert_holds(model, golden_weights)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_with_sizes_from_shapes(tmp_path, golden_weights, golden_config, prefix):
    path = tmp_path / "weights.safetensors"
    save_file({prefix + key: tensor.clone() for key, tensor in golden_weights.items()}, path)
    assert_holds(mf.from_pretrained(path, task="captioning"), golden_weights)
    with pytest.raises(mf.CheckpointError, match=r"text\.fusion_layers .*pass config="):
        mf.from_pretrained(path, task="question_answering")
    model = mf.from_pretrained(path, config=golden_config)
    assert model.config == golden_config
    assert_holds(model, golden_weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("task", ["captioning", "question_answering"])
def test_dtypes(golden_file, golden_weights, task, dtype):
    assert_holds(mf.from_pretrained(golden_file, task=task, dtype=dtype), golden_weights, dtype)


def test_default_dtype_is_torchs(golden_file, golden_weights, tmp_path):
    folder = convert(golden_file, tmp_path / "half", dtype=torch.bfloat16)
    rounded = {key: tensor.bfloat16() for key, tensor in golden_weights.items()}
    assert_holds(mf.from_pretrained(folder), rounded)


def test_tasks_of_a_captioning_directory(golden_file, golden_weights, tmp_path):
    folder = convert(golden_file, tmp_path / "captioning", task="captioning")
    assert isinstance(mf.from_pretrained(folder), mf.MPlug2ForCaptioning)
    with pytest.raises(mf.CheckpointError) as caught:
        mf.from_pretrained(folder, task="question_answering")
    assert str(caught.value).startswith(f"{folder} does not fit a question answering model")
    assert "missing: 89 entries" in str(caught.value)
    assert 'task="captioning"' in str(caught.value)


def test_differing_twins_are_refused(tmp_path, golden_weights):
    path = tmp_path / "checkpoint.pth"
    twin = "text_decoder.cls.predictions.decoder.bias"
    torch.save({"model": golden_weights | {twin: torch.ones(400)}}, path)
    with pytest.raises(mf.CheckpointError, match=f"^{path}: {twin} differs"):
        mf.from_pretrained(path, task="captioning")


@pytest.mark.parametrize("level", [1, 9])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_STORED])
def test_archives_that_were_packed_again(tmp_path, golden_weights, method, level):
    torch.save({"model": golden_weights}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as a, zipfile.ZipFile(tmp_path / "b.pth", "w", method, True, level) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name))
    assert_holds(mf.from_pretrained(tmp_path / "b.pth", task="captioning", pack=False), golden_weights)


def test_an_archive_without_checksums(tmp_path, golden_weights):
    path = tmp_path / "checkpoint.pth"
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": golden_weights}, path)
    finally:
        torch.serialization.set_crc32_options(computed)
    assert_holds(mf.from_pretrained(path, task="captioning", pack=False), golden_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, golden_weights, golden_config, dtype, value):
    key, path = "text_decoder.bert.encoder.layer.1.output.dense.weight", tmp_path / "checkpoint.pth"
    bad = golden_weights[key].to(dtype, copy=True)
    bad[-1, -2] = value
    changed = golden_weights | {key: bad}
    torch.save({"model": changed}, path)
    with pytest.raises(mf.CheckpointError, match=f"^{path}: {key} has values that are not finite"):
        mf.from_pretrained(path, task="captioning")
    with pytest.raises(mf.CheckpointError, match=f"{key} has values that are not finite"):
        convert(path, tmp_path / "folder", task="captioning")
    assert not (tmp_path / "folder").exists()
    model = mf.MPlug2ForCaptioning(golden_config)
    before = {name: tensor.clone() for name, tensor in model.official_parameters().items()}
    with pytest.raises(mf.CheckpointError, match="nothing was loaded"):
        mf.load_released(model, changed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.official_parameters().items())


def test_weights_that_overflow_in_the_models_dtype(tmp_path, golden_weights):
    key, path = "visn_emb_norm.weight", tmp_path / "checkpoint.pth"
    changed = golden_weights | {key: torch.full((128,), -65520.0)}
    torch.save({"model": changed}, path)
    with pytest.raises(mf.CheckpointError, match=r"6.552e\+04, which are infinite in float16[\s\S]*use bfloat16"):
        mf.from_pretrained(path, task="captioning", dtype="float16")
    with pytest.raises(mf.CheckpointError, match="infinite in float16"):
        convert(path, tmp_path / "folder", task="captioning", dtype=torch.float16)
    for dtype in (torch.bfloat16, torch.float32):
        assert_holds(mf.from_pretrained(path, task="captioning", dtype=dtype, pack=False), changed, dtype)


def test_an_unused_entry_may_hold_anything(tmp_path, golden_weights):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": golden_weights | {"visual_encoder.logit_scale": torch.tensor(torch.nan)}}, path)
    mf.from_pretrained(path, task="captioning", pack=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {key: torch.empty(0) for key in w}, "zero_to_fp32.py"),
        (lambda w: w | {"a.lora_A.default.weight": torch.zeros(1)}, "merge_and_unload"),
        (lambda w: w | {"a._flat_param": torch.zeros(1)}, "FULL_STATE_DICT"),
        (lambda w: w | {"module.visn_emb_norm.weight": torch.zeros(1)}, "exists twice"),
    ],
)
def test_state_dicts_that_are_not_of_a_whole_model(tmp_path, golden_weights, golden_config, change, message):
    torch.save({"model": change(golden_weights)}, tmp_path / "checkpoint.pth")
    with pytest.raises(mf.CheckpointError, match=message):
        mf.from_pretrained(tmp_path / "checkpoint.pth", task="captioning", config=golden_config)
    with pytest.raises(mf.CheckpointError, match=message):
        mf.load_released(mf.MPlug2ForCaptioning(golden_config), change(golden_weights))


def test_heads_that_a_file_lacks_can_be_new(tmp_path):
    from mplug2_fast.predict.predictor import TINY_MODEL
    from mplug2_fast.tasks import Classification

    tasks = ["question_answering", "retrieval", "mlm", Classification(["a", "b"], name="letters")]
    file = mf.checkpoint.convert(TINY_MODEL, tmp_path / "answers", task="question_answering")
    with pytest.raises(mf.CheckpointError, match=r"no weights for heads\.letters, itm_head, temp, text_enc"):
        mf.from_pretrained(file, tasks=tasks)
    torch.manual_seed(0)
    model = mf.from_pretrained(file, tasks=tasks, new_heads=True, pack=False)
    stored = mf.official_state_dict(mf.from_pretrained(file, tasks=tasks[:1]))
    found = mf.official_state_dict(model)
    assert all(torch.equal(found[key], value) for key, value in stored.items())
    assert len(found.keys() - stored.keys()) == 14
    assert all(found[key].isfinite().all() for key in found)
    assert found["itm_head.weight"].std() == pytest.approx(0.02, abs=0.005)
    with pytest.raises(mf.CheckpointError, match="visual_encoder"):
        mf.from_pretrained(file, task="clip", new_heads=True)


@pytest.mark.parametrize("kind", [Captioning, QuestionAnswering])
def test_the_callers_own_task_is_kept(kind):
    own = type("Own", (kind,), {})()
    assert mf.from_pretrained(TINY_MODEL, tasks=[own]).tasks[kind.name] is own
