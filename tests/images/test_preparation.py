"""Files as the input of mPLUG: in this process, in decoding processes, and in training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import mplug2_fast as mf
from mplug2_fast.datasets import Item
from mplug2_fast.errors import ConfigError, DataError
from mplug2_fast.images import MPLUG, MPlugGrounding
from mplug2_fast.images.transforms import in_square, normalise, resize
from mplug2_fast.tasks import get
from mplug2_fast.training.data import ItemDataset, video_of
from mplug2_fast.video import DecodePool, Preparation, Windows
from mplug2_fast.video.frames import prepare_clip
from mplug2_fast.video.preparation import MPLUG2
from tests.video.clips import moving_frames, write_video

SIZE = 32
GROUNDING = MPlugGrounding(SIZE)
BOX = (0.3, 0.5, 0.4, 0.5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    frames = moving_frames(7)
    images = [Image.fromarray(frame) for frame in frames[:3]]
    images[0].save(folder / "image.png")
    images[0].save(folder / "animation.gif", save_all=True, append_images=images[1:])
    write_video(folder / "video.mp4", "libx264", frames)
    write_video(folder / "picture.avi", "huffyuv", frames[:1])
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(31, 16, list(range(16))), (32, 16, list(range(0, 32, 2))), (5, 8, [0] * 8), (1, 1, [0]), (10, 3, [0, 3, 6])],
)
def test_mplug_takes_every_nth_frame(total: int, count: int, expected: list[int]):
    assert MPLUG.frames(total, count) == expected


def test_images_are_squashed_by_pillow(files: dict[str, Path]):
    pixels = moving_frames(1)[0]
    expected = normalise(torch.tensor(resize(pixels, SIZE, SIZE, bicubic=True))[None])
    for name, decoder in (("image", "pillow"), ("picture", "pyav")):
        clip = prepare_clip(files[name], MPLUG, 1, SIZE)
        assert (clip.decoder, clip.indices, clip.size) == (decoder, [0], (96, 80))
        torch.testing.assert_close(clip.video, expected, rtol=0, atol=1e-6)
    assert prepare_clip(files["image"], MPLUG, 3, SIZE).indices == [0, 0, 0]


def test_videos_are_squashed_by_the_bilinear_filter_of_libav(files: dict[str, Path]):
    clip = prepare_clip(files["video"], MPLUG, 3, SIZE)
    assert (clip.decoder, clip.indices, clip.size) == ("pyav", [0, 2, 4], (96, 80))
    with av.open(str(files["video"])) as container:
        frames = [
            frame.reformat(SIZE, SIZE, "rgb24", interpolation="BILINEAR").to_ndarray()
            for frame in container.decode(video=0)
        ]
    expected = normalise(torch.from_numpy(np.stack(frames[0:5:2])))
    torch.testing.assert_close(clip.video, expected, rtol=0, atol=1e-6)


def test_an_animation_is_an_image_or_a_video(files: dict[str, Path]):
    assert prepare_clip(files["animation"], MPLUG, 1, SIZE).decoder == "pillow"
    clip = prepare_clip(files["animation"], MPLUG, 3, SIZE)
    assert (clip.decoder, clip.indices) == ("pyav", [0, 1, 2])


@pytest.mark.parametrize("preparation", [MPLUG2, MPLUG, GROUNDING], ids=lambda preparation: preparation.name)
def test_decoding_processes_give_the_same(files: dict[str, Path], preparation: Preparation):
    with DecodePool(1, num_frames=2, image_size=SIZE, preparation=preparation) as pool:
        clips = {Path(clip.source).stem: clip for clip in pool.clips(files.values())}
    for name, path in files.items():
        expected = prepare_clip(path, preparation, 2, SIZE)
        found = clips[name]
        assert (found.indices, found.size, found.backend) == (expected.indices, expected.size, expected.decoder)
        assert torch.equal(found.frames, expected.video)


def test_an_image_is_one_window(files: dict[str, Path]):
    with DecodePool(1, image_size=SIZE, windows=Windows(3, 3), preparation=MPLUG) as pool:
        (clip,) = pool.clips([files["image"]])
        windows = [clip.indices for clip in pool.clips([files["video"]])]
    assert (clip.indices, clip.last) == ([0, 0, 0], True)
    assert windows == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]


def test_boxes_of_the_square_become_pixels_of_the_picture():
    assert MPLUG.box_in_pixels((0.5, 0.5, 0.5, 2.0), 100, 50) == (25, 0, 75, 50)
    width, height = 100, 50
    square = GROUNDING.box_in_square(BOX, width, height)
    np.testing.assert_allclose(GROUNDING.box_in_pixels(square, width, height), (10, 12.5, 50, 37.5), atol=1e-6)


def test_the_margin_of_a_square_is_zero(files: dict[str, Path]):
    video = prepare_clip(files["image"], GROUNDING, 1, SIZE).video
    margin = (in_square(np.full((80, 96, 3), 255, np.uint8), SIZE) == 0)[..., 0]
    assert margin.sum() == SIZE * 5
    assert (video[:, 0, margin] == 0).all()
    assert (video[:, 0, ~margin] != 0).all()


def test_mplug2_prepares_as_before(files: dict[str, Path]):
    assert mf.MPlug2Config.preset("tiny").preparation == MPLUG2
    assert torch.equal(prepare_clip(files["video"], MPLUG2, 4, SIZE).video, mf.load_video(files["video"], 4, SIZE))


def dataset(item: Item, augment: str | None, preparation: Preparation) -> ItemDataset:
    vision = mf.MPlug2Config.preset("tiny").replace(num_frames=1, image_size=SIZE).vision
    return ItemDataset([item], [get("captioning")], vision, augment, preparation=preparation)


def test_training_samples(files: dict[str, Path]):
    item = Item("a", image=str(files["image"]), caption=("left",), text="the left one", box=BOX)
    samples = {
        name: [dataset(item, name, GROUNDING).sample(0, np.random.default_rng(seed)) for seed in (0, 0, 1)]
        for name in ("none", "randaugment", "grounding")
    }
    for first, again, _ in samples.values():
        assert first.item == again.item
        assert torch.equal(video_of([first], SIZE), video_of([again], SIZE))
        assert video_of([first], SIZE).shape == (1, 3, 1, SIZE, SIZE)
    assert samples["none"][0].item.box == GROUNDING.box_in_square(BOX, 96, 80)
    assert samples["randaugment"][0].item == item
    assert {sample.item.text for sample in samples["grounding"]} <= {"the left one", "the right one"}
    assert samples["grounding"][0].item.box != samples["grounding"][2].item.box
    part = Item("b", video=str(files["video"]), start=0.1, caption=("a",))
    assert dataset(part, None, MPLUG).sample(0, np.random.default_rng(0)).frames.shape == (3, 1, SIZE, SIZE)


def test_augmentations_that_do_not_fit_are_refused(files: dict[str, Path]):
    image = Item("a", image=str(files["image"]), caption=("a",))
    with pytest.raises(ConfigError, match="no augmentation 'video' for this model: choose one of none, randaugment,"):
        dataset(image, "video", MPLUG)
    with pytest.raises(ConfigError, match="no augmentation 'randaugment' for this model: choose one of none, video"):
        dataset(image, "randaugment", MPLUG2)
    with pytest.raises(DataError, match="grounding needs an image, a text and a box, which the item a lacks"):
        dataset(image, "grounding", GROUNDING)


def test_decoding_processes_need_no_torch():
    code = "import sys, mplug2_fast.images.preparation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
