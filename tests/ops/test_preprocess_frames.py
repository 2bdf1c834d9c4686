"""preprocess_frames: all backends agree bit for bit, also with the arithmetic written out here."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2_fast import MPlug2Config, _native, ops
from mplug2_fast.errors import BackendError
from mplug2_fast.nn.vision_transformer import VisionTransformer
from mplug2_fast.ops import preprocess_frames
from mplug2_fast.ops.preprocess_frames import MEAN, STD
from tests.ops.suite import TRITON_DEVICE, TRITON_DTYPES, OpSuite, device

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_frames(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def expected_pixels(frames, size):
    """One pixel at a time, in float32."""
    count, height, width, _ = frames.shape
    pixels = frames.numpy()
    result = np.empty((3, count, size, size), np.float32)
    for y in range(size):
        for x in range(size):
            pixel = pixels[:, y * height // size, x * width // size].astype(np.float32)
            result[:, :, y, x] = ((pixel / np.float32(255) - np.float32(MEAN)) / np.float32(STD)).T
    return torch.from_numpy(result)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected)


class TestSpecification(OpSuite):
    operator = ops.preprocess_frames


@pytest.fixture(params=["cpu", "torch", *(["triton"] if TRITON_DEVICE else [])])
def each_backend(request):
    if request.param == "cpu":
        request.getfixturevalue("native_module")
    with ops.use_backend(request.param):
        yield request.param


def is_refused(backend, dtype):
    """Whether the backend does not support this type and says so."""
    if backend != "triton" or dtype in TRITON_DTYPES:
        return False
    with pytest.raises(BackendError, match="Triton"):
        preprocess_frames(random_frames(1, 4, 4, 3).to(device(backend)), 4, dtype)
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "size"),
    [((1, 1, 1, 3), 1), ((2, 5, 7, 3), 3), ((3, 4, 2, 3), 9), ((1, 31, 17, 3), 14), ((2, 224, 224, 3), 224)],
)
def test_each_backend_gives_the_specified_pixels(each_backend, shape, size, dtype):
    if is_refused(each_backend, dtype):
        return
    frames = random_frames(*shape)
    result = preprocess_frames(frames.to(device(each_backend)), size, dtype)
    assert result.is_contiguous()
    assert_same_bits(result.cpu(), expected_pixels(frames, size).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_of_every_channel(each_backend, dtype):
    if is_refused(each_backend, dtype):
        return
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    result = preprocess_frames(frames.to(device(each_backend)), 16, dtype).cpu()
    values = torch.arange(256, dtype=torch.float32)
    for channel in range(3):
        expected = (values / 255 - torch.tensor(MEAN[channel])) / torch.tensor(STD[channel])
        assert_same_bits(result[channel].flatten(), expected.to(dtype))


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)),
    size=st.integers(1, 50),
    layout=st.sampled_from(["contiguous", "cropped", "channels_first", "repeated_frame", "every_other", "offset"]),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
    patches=st.sampled_from([None, 1, 2, 5]),
)
def test_backends_agree_on_any_strides(native_module, shape, size, layout, dtype, threads, patches):
    count, height, width = shape
    frames = {
        "contiguous": lambda: random_frames(count, height, width, 3),
        "cropped": lambda: random_frames(count + 1, height + 2, width + 3, 4)[1:, 1 : height + 1, 2 : width + 2, 1:],
        "channels_first": lambda: random_frames(3, count, height, width).permute(1, 2, 3, 0),
        "repeated_frame": lambda: random_frames(1, height, width, 3).expand(count, -1, -1, -1),
        "every_other": lambda: random_frames(2 * count, 2 * height, 2 * width, 3)[::2, 1::2, ::2],
        "offset": lambda: random_frames(count * height * width * 3 + 1)[1:].view(count, height, width, 3),
    }[layout]()
    assert frames.shape == (count, height, width, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ops.use_backend("cpu"):
            actual = preprocess_frames(frames, size * (patches or 1), dtype, patch_size=patches)
    finally:
        torch.set_num_threads(before)
    with ops.use_backend("torch"):
        expected = preprocess_frames(frames.contiguous(), size * (patches or 1), dtype, patch_size=patches)
    assert_same_bits(actual, expected)


def test_patches_are_what_the_vision_encoder_multiplies(each_backend):
    frames = random_frames(3, 50, 70, 3)
    visual = VisionTransformer(MPlug2Config.preset("tiny").vision)
    torch.nn.init.normal_(visual.patch_weight)
    size, side = visual.config.image_size, visual.config.patch_size
    on_device = frames.to(device(each_backend))
    video, patches = preprocess_frames(on_device, size).cpu(), preprocess_frames(on_device, size, patch_size=side).cpu()
    assert patches.is_contiguous()
    embedded = torch.nn.functional.linear(patches, visual.patch_weight)
    with ops.use_backend("torch"):
        torch.testing.assert_close(visual.patches(video[None])[0], embedded)


@pytest.mark.skipif(TRITON_DEVICE is None, reason="Triton runs on a GPU or under its interpreter")
def test_triton_gives_the_bits_of_the_others_on_any_strides():
    frames = random_frames(3, 2, 33, 40).permute(1, 2, 3, 0)[:, 1:, ::2]
    for size, patch_size in ((16, None), (60, 12), (7, 7)):
        with ops.use_backend("triton"):
            actual = preprocess_frames(frames.to(TRITON_DEVICE), size, patch_size=patch_size)
        with ops.use_backend("torch"):
            assert_same_bits(actual.cpu(), preprocess_frames(frames, size, patch_size=patch_size))


@pytest.mark.skipif(TRITON_DEVICE is None, reason="Triton runs on a GPU or under its interpreter")
def test_indices_beyond_32_bits_are_left_to_torch():
    frames = random_frames(1, 1, 1, 3).to(TRITON_DEVICE).expand(1, 1 << 20, 1, 3)
    assert "32 bits" in str(ops.explain(preprocess_frames, frames, 2048))


def test_without_the_native_module_torch_says_so(monkeypatch):
    error = _native.NativeError("it was lost in the post.", "Send it again.", "")
    monkeypatch.setattr(_native, "_load", lambda: (None, error))
    _native.warn_without_native.cache_clear()
    frames = random_frames(1, 4, 4, 3)
    with pytest.warns(RuntimeWarning, match="PyTorch fallbacks.*lost in the post"):
        result = preprocess_frames(frames, 2)
    assert_same_bits(result, expected_pixels(frames, 2))
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="lost in the post"):
        preprocess_frames(frames, 2)


@pytest.mark.parametrize(
    ("frames", "arguments", "error", "message"),
    [
        (torch.zeros(1, 4, 4, 3), {}, TypeError, "must be uint8 .* got torch.float32"),
        (random_frames(4, 4, 3), {}, ValueError, r"\(frames, height, width, 3\), got \(4, 4, 3\)"),
        (random_frames(1, 3, 4, 4), {}, ValueError, r"got \(1, 3, 4, 4\)"),
        (random_frames(0, 4, 4, 3), {}, ValueError, "have no pixels"),
        (random_frames(1, 0, 4, 3), {}, ValueError, "have no pixels"),
        (random_frames(1, 4, 4, 3), {"image_size": 0}, ValueError, "at least 1, got 0"),
        (random_frames(1, 4, 4, 3), {"image_size": 2.5}, ValueError, "got 2.5"),
        (random_frames(1, 4, 4, 3), {"patch_size": 0}, ValueError, "patch_size must be .* at least 1, got 0"),
        (
            random_frames(1, 4, 4, 3),
            {"patch_size": 3},
            ValueError,
            "image_size must be a multiple of patch_size, got 4 and 3",
        ),
        (random_frames(1, 4, 4, 3), {"dtype": torch.int32}, TypeError, "got torch.int32"),
    ],
)
def test_bad_input_is_named(frames, arguments, error, message):
    with pytest.raises(error, match=message):
        preprocess_frames(frames, **{"image_size": 4, **arguments})


@pytest.mark.parametrize(
    ("sizes", "size", "side", "element_size", "threads"),
    [
        ((1, 0, 4), 4, 4, 4, 1),
        ((-1, 4, 4), 4, 4, 4, 1),
        ((1, 4, 4), 0, 1, 4, 1),
        ((1, 4, 4), 4, 4, 3, 1),
        ((1, 4, 4), 4, 4, 4, 0),
        ((1, 4, 4), 4, 0, 4, 1),
        ((1, 4, 4), 4, 3, 4, 1),
    ],
)
def test_the_module_itself_refuses_sizes_that_make_no_sense(native_module, sizes, size, side, element_size, threads):
    layout = (side, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="preprocess_frames"):
        native_module.preprocess_frames(0, sizes, (1, 1, 1, 1), size, layout, 0, element_size, 0, threads)


@pytest.mark.usefixtures("native_module")
def test_the_default_device_does_not_matter():
    frames = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    expected = preprocess_frames(frames, 4)
    with torch.device("meta"):
        assert torch.equal(preprocess_frames(frames, 4), expected)


def test_a_result_that_cannot_be_allocated_fails_at_once():
    frames = torch.zeros(2, 5, 7, 3, dtype=torch.uint8)
    with ops.use_backend("torch"), pytest.raises(RuntimeError, match=r"overflow|alloc"):
        preprocess_frames(frames, 2**31)
