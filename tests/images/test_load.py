"""Image files of many kinds, readable and not."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mplug2_fast.errors import VideoError
from mplug2_fast.images import load_image
from mplug2_fast.video import Limits
from tests.video.clips import moving_frames, write_video

COLOURS = np.array([[[250, 10, 10], [10, 250, 10], [10, 10, 250]], [[0, 0, 0], [128, 128, 128], [255, 255, 255]]])
COLOURS = COLOURS.astype(np.uint8)
PICTURE = Image.fromarray(COLOURS)
GREY = np.array([[0, 100, 255], [7, 128, 200]], np.uint8)


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels_of(image: Image.Image, format: str = "PNG", **options) -> np.ndarray:
    loaded = load_image(saved(image, format, **options))
    assert loaded.decoder == "pillow"
    assert loaded.pixels.dtype == np.uint8
    return loaded.pixels


def test_colours_stay():
    transparent = PICTURE.convert("RGBA")
    transparent.putalpha(Image.fromarray(np.array([[0, 50, 255]] * 2, np.uint8)))
    palette = PICTURE.quantize(6)
    for image in (PICTURE, transparent, palette):
        assert (pixels_of(image) == COLOURS).all(), image.mode
    see_through = io.BytesIO()
    palette.save(see_through, "PNG", transparency=bytes([0, 100, 255]))
    assert (load_image(see_through.getvalue()).pixels == COLOURS).all()
    animation = saved(palette, "GIF", save_all=True, append_images=[palette.transpose(0)])
    assert (load_image(animation).pixels == COLOURS).all()
    assert (pixels_of(PICTURE.convert("CMYK"), "TIFF") == COLOURS).all()


def test_grey_levels_become_rgb():
    grey = np.repeat(GREY[..., None], 3, axis=2)
    sixteen = GREY.astype(np.uint16) * 256 + 99
    for image in (
        Image.fromarray(GREY),
        Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY)]),
        Image.fromarray(sixteen),
    ):
        assert (pixels_of(image) == grey).all(), image.mode
    assert (pixels_of(Image.fromarray(sixteen.astype(np.int32)), "TIFF") == grey).all()
    assert (pixels_of(Image.fromarray(GREY.astype(np.float32)), "TIFF") == grey).all()
    assert (pixels_of(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF") == grey).all()
    assert pixels_of(Image.fromarray(GREY > 99))[..., 0].tolist() == [[0, 255, 255], [0, 255, 255]]


def test_adobe_stores_inverted_cmyk():
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    data = saved(flat, "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(load_image(data).pixels.astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_becomes_upright(format: str, orientation: int):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255
    undo = {  # how a camera stores the upright picture
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(undo)), format, exif=exif)
    loaded = load_image(data).pixels
    assert loaded.shape == upright.shape
    assert np.abs(loaded.astype(int) - upright).mean() < 4


def png(width: int, height: int, *, data: bytes = b"") -> bytes:
    """A PNG file that claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("empty.jpg", b"", "is empty"),
        ("text.png", b"not a picture at all", "is corrupt: it cannot be decoded"),
        ("cut.jpg", saved(PICTURE.resize((99, 99)), "JPEG")[:-300], "truncated"),
        ("cut.png", saved(PICTURE.resize((99, 99)), "PNG")[:-40], "is corrupt"),
        ("wrong.png", png(9, 9, data=b"nonsense"), "is corrupt"),
        ("bomb.png", png(40_000, 40_000), "40,000x40,000|has too many pixels for Pillow"),
        ("large.png", png(8_000, 8_000), "GiB of memory"),
        ("no\nsuch.png", None, "no such file"),
    ],
)
def test_bad_files_give_one_line(tmp_path: Path, name: str, data: bytes | None, reason: str):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(VideoError, match=reason) as caught:
        load_image(path, limits=Limits(memory=2**28))
    assert str(caught.value).startswith(f"{path}: ".replace("\n", " "))
    assert "\n" not in str(caught.value)


def test_limits_count_pixels():
    with pytest.raises(VideoError, match=r"bytes in memory: has 3x2 pixels, more than 5 in total; raise Limits.pixels"):
        load_image(saved(PICTURE, "PNG"), limits=Limits(pixels=5))


def test_a_folder_is_no_image(tmp_path: Path):
    with pytest.raises(VideoError, match="is a directory"):
        load_image(tmp_path)


def test_pyav_decodes_what_pillow_does_not_know(tmp_path: Path):
    frames = moving_frames(3)
    path = write_video(tmp_path / "clip.avi", "huffyuv", frames)
    loaded = load_image(path)
    assert loaded.decoder == "pyav"
    assert (loaded.pixels == frames[0]).all()
