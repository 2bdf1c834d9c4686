"""The included tiny model gives the same results on a GPU as on the CPU."""

import copy
from pathlib import Path

import pytest
import torch

import mplug2_fast as mf
from examples.moving_shapes.generator.clips import clip_frames
from examples.moving_shapes.generator.scenes import held_out_scenes
from mplug2_fast import ops
from mplug2_fast.ops import preprocess_frames
from mplug2_fast.video import frame_indices
from tests.tiny import SMALL, pair, random_text, random_video

pytestmark = pytest.mark.gpu

TINY = Path(mf.__file__).parent / "data" / "tiny"


@pytest.fixture(scope="module")
def clips():
    """Six moving shapes, (6, 4, 128, 128, 3) uint8."""
    scenes = held_out_scenes(6)
    return torch.stack([torch.from_numpy(clip_frames(scenes[i])[frame_indices(16, 4)]) for i in range(6)])


@pytest.fixture(scope="module")
def models():
    return tuple(mf.from_pretrained(TINY, task="captioning", device=device) for device in ("cpu", "cuda"))


def video_of(clips, device):
    return torch.stack([preprocess_frames(clip.to(device), 32) for clip in clips])


def test_captions_are_those_of_the_cpu(clips, models):
    here, there = (
        model.generate(video_of(clips, device), num_beams=5, num_return=2)
        for model, device in zip(models, ("cpu", "cuda"), strict=True)
    )
    assert torch.equal(there.sequences.cpu(), here.sequences)
    torch.testing.assert_close(there.scores.cpu(), here.scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_features_are_those_of_the_cpu(clips, models, dtype, bound):
    here, there = models
    there = copy.deepcopy(there).to(dtype)
    with torch.no_grad():
        expected, actual = here.encode_video(video_of(clips, "cpu")), there.encode_video(video_of(clips, "cuda"))
    assert actual.dtype == dtype
    assert (actual.cpu().float() - expected).norm() < bound * expected.norm()


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="the GPU has no e4m3 products"
)
def test_fp8_features_are_those_of_pytorch(clips):
    """From a second call in a CUDA graph too."""
    model = mf.from_pretrained(TINY, task="captioning", dtype="fp8", device="cuda")
    video = video_of(clips, "cuda").to(torch.bfloat16)
    with torch.no_grad(), ops.use_backend("torch"):
        expected = copy.deepcopy(model).encode_video(video).float()
    with torch.no_grad():
        for _ in range(3):
            actual = model.encode_video(video)
            assert (actual.float() - expected).norm() < 5e-2 * expected.norm()


def test_losses_and_gradients_are_those_of_the_reference():
    reference, fast = pair(SMALL)
    fast = fast.cuda()
    video, (ids, mask) = random_video(SMALL), random_text(SMALL, 2, 9)
    expected = reference(video, ids, mask)
    expected.backward()
    actual = fast(video.cuda(), ids.cuda(), mask.cuda())
    actual.backward()
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)
    true = {key: parameter.grad for key, parameter in reference.named_parameters()}
    for key, gradient in fast.official_gradients().items():
        assert (gradient.cpu() - true[key]).norm() <= 1e-4 * true[key].norm().clamp_min(1e-2), key
