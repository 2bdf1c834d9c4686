"""Models and checkpoints with e4m3 weights. On a CPU, PyTorch's operators compute them."""

import copy
import json
from pathlib import Path

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast import ops
from mplug2_fast.checkpoint import convert, from_pretrained, inspect, save_pretrained
from mplug2_fast.errors import BackendError, CheckpointError, ConfigError
from mplug2_fast.nn.fp8 import Fp8Linear
from mplug2_fast.nn.text_decoder import TextDecoder
from mplug2_fast.ops.linear_fp8 import DTYPE, quantise_weight
from mplug2_fast.predict import Captioner
from mplug2_fast.predict.predictor import TINY_MODEL
from tests.tiny import SMALL, random_video, randomise

CLIPS = sorted((Path(__file__).parents[2] / "examples/moving_shapes/clips").glob("*.mp4"))
LAYER = "text_decoder.bert.encoder.layer.0"
WEIGHT = "visual_encoder.visual.transformer.resblocks.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with wide weights, none of which are zero."""
    model = randomise(mf.MPlug2ForQuestionAnswering(SMALL).requires_grad_(False))
    return save_pretrained(model, tmp_path_factory.mktemp("small") / "wide")


@pytest.fixture(scope="module")
def folder(small):
    return convert(small, small.parent / "fp8", dtype="fp8")


def load(*arguments, **options):
    with ops.use_backend("torch"):
        return from_pretrained(*arguments, **options)


def same(one, other):
    one, other = one.official_parameters(), other.official_parameters()
    assert one.keys() == other.keys()
    for key, view in one.items():
        assert view.dtype == other[key].dtype, key
        assert torch.equal(view.view(torch.uint8), other[key].view(torch.uint8)), key


def test_the_products_of_many_rows_are_rounded(small):
    wide, model = from_pretrained(small), load(small, dtype="fp8")
    views, wide_views = model.official_parameters(), wide.official_parameters()
    rounded = {key for key in views if f"{key}_scale" in views}
    for key in rounded:
        assert (views[key].dtype, views[f"{key}_scale"].dtype) == (DTYPE, torch.float32)
    memory = {f"{LAYER}.crossattention.self.{name}.weight" for name in ("key", "value")}
    assert {key for key in rounded if key.startswith(LAYER)} == memory
    layers = [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)]
    assert {name.partition(".")[0] for name in layers} == {"visual", "universal", "fusion", "decoder"}
    for key in (*memory, "fusion_encoder.encoder.layer.0.output.dense.weight"):
        numbers, scale = quantise_weight(wide_views[key])
        assert torch.equal(views[key].view(torch.uint8), numbers.view(torch.uint8))
        assert torch.equal(views[f"{key}_scale"], scale)
    assert model.precision == "fp8"


def test_results_are_close(small):
    wide, model = from_pretrained(small), load(small, dtype="fp8").float()
    video = random_video(SMALL)
    expected = wide.encode_video(video)
    with ops.use_backend("torch"):
        found = model.encode_video(video)
    assert 0.003 < (found - expected).norm() / expected.norm() < 0.1


def test_without_a_gpu_it_is_an_error(small, folder):
    """When it is loaded, and when it computes. Nothing else computes in its place."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    expected = r"compute capability 8\.9 or later, and the device is a CPU: use int8 on a CPU and bfloat16 on an older"
    for path, dtype in ((small, "fp8"), (small, DTYPE), (folder, None), (folder, "fp8")):
        with pytest.raises(ConfigError, match=expected):
            from_pretrained(path, dtype=dtype)
    with pytest.raises(ConfigError, match=expected):
        Captioner(TINY_MODEL, dtype="fp8")
    model = load(folder)
    with pytest.raises(BackendError, match="linear_fp8 has no backend for this call"):
        model.encode_video(random_video(SMALL).to(next(model.parameters()).dtype))


def test_a_converted_folder_is_read(folder, small, tmp_path):
    stated = json.loads((folder / "config.json").read_text())
    assert stated["quantisation"] == {"weights": "fp8", "keep": []}
    same(load(folder), load(small, dtype="fp8"))
    found = inspect(folder)
    assert (found.ok, found.weights, found.keep) == (True, "fp8", ())
    assert found.dtypes.keys() == {"float8_e4m3fn", "float32", "bfloat16"}
    convert(folder, tmp_path / "part", task="captioning")
    same(load(tmp_path / "part"), load(folder, "captioning"))
    save_pretrained(load(folder), tmp_path / "saved")
    same(load(tmp_path / "saved"), load(folder))
    for other in ("int8", "bfloat16"):
        with pytest.raises(CheckpointError, match=f"cannot be loaded as {other}: load it as fp8"):
            load(folder, dtype=other)


def test_layers_are_kept(small):
    keep = ["decoder.layers.0", "visual.blocks.*.mlp.*"]
    model = load(small, dtype="fp8", keep=keep)
    names = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert not any(name.startswith("decoder.layers.0") or "mlp" in name for name in names)
    assert "decoder.layers.1.crossattention.self.memory_proj" in names
    assert model.precision == "fp8 but decoder.layers.0, visual.blocks.*.mlp.*"
    with pytest.raises(ConfigError, match=r"keep 'text\.\*' matches no layer: layers are in visual\.\*"):
        load(small, dtype="fp8", keep=["text.*"])


def test_damaged_numbers_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHT].view(torch.uint8)[3, 5] = 127
    config = (folder / "config.json").read_text()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "mplug2_config": config})
    with pytest.raises(CheckpointError, match=r"c_fc\.weight has values that are not finite"):
        load(tmp_path / "model.safetensors")


def test_dtypes_of_numbers_and_scales_stay(folder):
    model = copy.deepcopy(load(folder)).to(torch.float16)
    layer = model.visual.blocks[0].mlp.c_fc
    assert (layer.weight.dtype, layer.scale.dtype, layer.bias.dtype) == (DTYPE, torch.float32, torch.float16)


def test_decoders_step_as_wide_ones():
    """With a rounded memory: one operator per layer, and the same logits as part by part."""
    torch.manual_seed(0)
    decoder = TextDecoder(SMALL.text, SMALL.text.text_decode_layers).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    from mplug2_fast.nn.quantise import quantise, quantise_memory_projections

    assert len(quantise_memory_projections(decoder, kind=Fp8Linear)) == SMALL.text.text_decode_layers
    assert quantise_memory_projections(decoder, kind=Fp8Linear) == []
    assert not any("crossattention.self" in name for name in quantise(copy.deepcopy(decoder), kind=Fp8Linear))
    logits = []
    with ops.use_backend("torch"), torch.no_grad():
        for step_by in (None, "part"):
            memory = decoder.remember(torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1)))
            memory.step_by = step_by
            logits.append(decoder.step(torch.tensor([[3], [5]]), 0, decoder.new_cache(2, 1, 4), memory))
            assert memory.step_by == (step_by or "layer")
    torch.testing.assert_close(*logits)


def test_the_tiny_model_says_the_same():
    with ops.use_backend("torch"):
        expected = [each.text for each in Captioner(dtype="float32", device="cpu").caption(CLIPS)]
        found = [each.text for each in Captioner(TINY_MODEL, dtype="fp8", device="cpu").caption(CLIPS)]
    assert found == expected
