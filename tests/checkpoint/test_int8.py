"""Checkpoints with 8-bit weights."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mplug2_fast as mf
from mplug2_fast.checkpoint import convert, from_pretrained, inspect, save_pretrained
from mplug2_fast.checkpoint.eight_bit import others_dtype
from mplug2_fast.errors import CheckpointError, ConfigError
from mplug2_fast.nn.int8 import Int8Linear
from mplug2_fast.ops.linear_int8 import quantise_weight
from mplug2_fast.predict import Captioner
from mplug2_fast.predict.predictor import TINY_MODEL, TINY_MPLUG
from tests.tiny import SMALL, random_video, randomise

WEIGHT = "visual_encoder.visual.transformer.resblocks.0.mlp.c_fc.weight"
QUERY = "text_decoder.bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with wide weights, none of which are zero."""
    model = randomise(mf.MPlug2ForQuestionAnswering(SMALL).requires_grad_(False))
    return save_pretrained(model, tmp_path_factory.mktemp("small") / "wide")


@pytest.fixture(scope="module")
def folder(small):
    return convert(small, small.parent / "int8", dtype="int8")


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy, and a function that writes other tensors into it."""
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)

    def write(**changes):
        header = json.loads((folder / "config.json").read_text())
        kept = {key: value for key, value in (tensors | changes).items() if value is not None}
        save_file(kept, file, metadata={"format": "pt", "mplug2_config": json.dumps(header)})
        return tmp_path / "copy"

    return tensors, write


def same(one, other):
    one, other = one.official_parameters(), other.official_parameters()
    assert one.keys() == other.keys()
    for key, view in one.items():
        assert view.dtype == other[key].dtype, key
        assert torch.equal(view, other[key]), key


def test_loading_rounds_the_weights_of_the_file(small):
    wide, model = from_pretrained(small), from_pretrained(small, dtype="int8")
    views, wide_views = model.official_parameters(), wide.official_parameters()
    for key in (QUERY, "fusion_encoder.encoder.layer.0.output.dense.weight"):
        numbers, scale = quantise_weight(wide_views[key])
        assert torch.equal(views[key], numbers)
        assert torch.equal(views[f"{key}_scale"], scale)
    assert views["visn_emb_norm.weight"].dtype == others_dtype()
    assert (model.precision, wide.precision) == ("int8", "float32")
    assert not any(module.training for module in model.modules())


def test_quantising_a_model_gives_the_same(small):
    loaded = from_pretrained(small, dtype="int8")
    model = from_pretrained(small).quantise().to(others_dtype())
    same(model, loaded)
    assert {layer.bits for layer in model.visual.modules() if isinstance(layer, Int8Linear)} == {8}
    assert {layer.bits for layer in model.decoder.modules() if isinstance(layer, Int8Linear)} == {16}


def test_results_are_close(small):
    wide, model = from_pretrained(small), from_pretrained(small, dtype="int8")
    video = random_video(SMALL)
    expected = wide.encode_video(video)
    found = model.encode_video(video.to(others_dtype())).float()
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_a_converted_folder_is_read(folder, small):
    stated = json.loads((folder / "config.json").read_text())
    assert stated["quantisation"] == {"weights": "int8", "keep": []}
    same(from_pretrained(folder), from_pretrained(small, dtype="int8"))
    same(from_pretrained(folder, dtype="int8", device="auto"), from_pretrained(folder, dtype="auto"))
    same(from_pretrained(folder / "model.safetensors", "captioning"), from_pretrained(folder, "captioning"))
    found = inspect(folder)
    assert found.ok
    assert found.keep == ()
    assert found.dtypes.keys() == {"int8", "float32", "bfloat16"}
    assert inspect(small).keep is None


def test_saving_a_quantised_model_writes_the_same(folder, tmp_path):
    model = from_pretrained(folder)
    save_pretrained(model, tmp_path / "saved")
    same(from_pretrained(tmp_path / "saved"), model)
    convert(folder, tmp_path / "again", task="captioning")
    same(from_pretrained(tmp_path / "again"), from_pretrained(folder, "captioning"))
    with pytest.raises(CheckpointError, match=r"cannot be saved as torch\.float32: leave dtype out"):
        save_pretrained(model, tmp_path / "wide", dtype=torch.float32)


def test_layers_are_kept(small, tmp_path):
    keep = ["decoder.layers.0", "visual.blocks.*.mlp.*"]
    convert(small, tmp_path / "kept", dtype="int8", keep=keep)
    model = from_pretrained(tmp_path / "kept")
    assert model.precision == "int8 but decoder.layers.0, visual.blocks.*.mlp.*"
    names = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert not any(name.startswith("decoder.layers.0") or "mlp" in name for name in names)
    assert any(name.startswith("decoder.layers.1") for name in names)
    same(model, from_pretrained(small, dtype="int8", keep=keep))
    assert inspect(tmp_path / "kept").keep == tuple(keep)
    convert(tmp_path / "kept", tmp_path / "part", task="captioning")  # a part of the tasks, with the same patterns
    assert from_pretrained(tmp_path / "part").quantisation.keep == tuple(keep)
    with pytest.raises(ConfigError, match="rounded already, so keep has no effect"):
        from_pretrained(tmp_path / "kept", keep=["decoder"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": ["decoder"]}, "use it with the dtype int8"),
        ({"dtype": "int8", "keep": ["encoder.*"]}, r"keep 'encoder\.\*' matches no layer: layers are in visual\.\*"),
        ({"dtype": "int8", "keep": "decoder"}, r"keep is a list of patterns: pass \['decoder'\]"),
        ({"dtype": "int7"}, "the dtype int7 is not supported: choose auto, float32, bfloat16, float16, int8 or fp8"),
    ],
)
def test_wrong_options(small, options, expected):
    with pytest.raises(ConfigError, match=expected):
        from_pretrained(small, **options)


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16])
def test_rounded_weights_cannot_be_loaded_as_others(folder, dtype, tmp_path):
    expected = "cannot be loaded as (float32|bfloat16): load it as int8, or load the checkpoint that it was converted"
    with pytest.raises(CheckpointError, match=expected):
        from_pretrained(folder, dtype=dtype)
    with pytest.raises(CheckpointError, match=expected):
        convert(folder, tmp_path / "wide", dtype=dtype)


def test_entries_are_checked(damaged):
    tensors, write = damaged
    cases = [
        ({f"{WEIGHT}_scale": None}, rf"missing: 1 entry\n.*\n.*{WEIGHT}_scale \[256\]"),
        ({"visn_emb_norm.weight_scale": torch.ones(64)}, "unexpected: 1 entry"),
        ({f"{QUERY}_scale": torch.ones(3)}, r"of another shape: 1 entry\n.*\n.*scale \[3\], needed \[64\]"),
        ({WEIGHT: tensors[WEIGHT].float()}, r"c_fc\.weight \(torch\.float32, needed torch\.int8\)"),
        ({f"{WEIGHT}_scale": tensors[f"{WEIGHT}_scale"].half()}, r"_scale \(torch\.float16, needed torch\.float32\)"),
        ({"visn_emb_norm.weight": torch.ones(64, dtype=torch.int8)}, "not floating point of 16 bits or more"),
    ]
    for changes, expected in cases:
        path = write(**changes)
        with pytest.raises(CheckpointError, match=expected):
            from_pretrained(path)
        assert inspect(path).problem is not None
    for changes, expected in [
        ({WEIGHT: torch.full_like(tensors[WEIGHT], -128)}, "has the 8-bit number -128: the file is damaged"),
        ({f"{WEIGHT}_scale": -tensors[f"{WEIGHT}_scale"]}, "has a negative scale: the file is damaged"),
        ({f"{WEIGHT}_scale": tensors[f"{WEIGHT}_scale"] * torch.nan}, "not finite"),
    ]:
        path = write(**changes)
        with pytest.raises(CheckpointError, match=expected):
            from_pretrained(path)


@pytest.mark.parametrize("stated", [{"weights": "int4"}, {"weights": "int8", "keep": "decoder"}, "int8"])
def test_another_quantisation_is_an_error(folder, tmp_path, stated):
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | {"quantisation": stated}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="this version reads weights int8 or fp8 with a list"):
        from_pretrained(tmp_path / "copy")


def test_such_a_model_cannot_be_trained(small):
    model = from_pretrained(small, dtype="int8")
    expected = "8-bit weights cannot be trained: train the original, then quantise the result"
    for train in (model.train, lambda: model.loss("captioning", {})):
        with pytest.raises(ConfigError, match=expected):
            train()
    with pytest.raises(ConfigError, match="has 8-bit weights already"):
        model.quantise()
    with pytest.raises(ConfigError, match=r"inference only: call eval\(\) first"):
        from_pretrained(small).train().quantise()


def test_copies_and_parts_keep_their_weights(small):
    model = from_pretrained(small, dtype="int8")
    assert copy.deepcopy(model).precision == "int8"
    captioner = model.captioner()
    assert captioner.precision == "int8"
    assert captioner.official_parameters().keys() < model.official_parameters().keys()


def test_mplug(tmp_path):
    convert(TINY_MPLUG, tmp_path / "int8", dtype="int8")
    model = from_pretrained(tmp_path / "int8", tasks=["captioning", "retrieval", "grounding"])
    assert isinstance(model.fusion.layers[0].output.dense, Int8Linear)
    same(model, from_pretrained(TINY_MPLUG, tasks=["captioning", "retrieval", "grounding"], dtype="int8"))


def test_the_packaged_model_captions_as_before():
    clips = sorted((Path(__file__).parents[2] / "examples/moving_shapes/clips").glob("*.mp4"))
    expected = [result.text for result in Captioner().caption(clips)]
    assert [result.text for result in Captioner(TINY_MODEL, dtype="int8").caption(clips)] == expected
