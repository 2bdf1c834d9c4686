"""Files that cannot be decoded: each gives one error line with the file and the reason."""

import os
import random
import struct

import av
import numpy as np
import pytest

from mplug2_fast import VideoError
from mplug2_fast.video import frame_indices, load_video, read_frames
from mplug2_fast.video.decode import decode_frames
from tests.video.clips import decode_all, moving_frames, write_sound, write_video


def clip(folder, extension, codec, **arguments):
    return write_video(folder / f"clip.{extension}", codec, moving_frames(40), **arguments)


def cut(path, part):
    """Keeps the first part of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    return path


def contents(name, data):
    def make(folder):
        path = folder / name
        path.write_bytes(data)
        return path

    return make


def cut_clip(extension, codec, part, **arguments):
    return lambda folder: cut(clip(folder, extension, codec, **arguments), part)


def cut_still(extension, codec):
    return lambda folder: cut(write_video(folder / f"still.{extension}", codec, moving_frames(1)), 0.6)


def noise(path, part, seed=0):
    """Overwrites a twentieth of a file, starting at that fraction."""
    data = bytearray(path.read_bytes())
    start, length = int(len(data) * part), len(data) // 20
    data[start : start + length] = random.Random(seed).randbytes(length)
    path.write_bytes(data)
    return path


def noise_in(extension, codec, **arguments):
    return lambda folder: noise(clip(folder, extension, codec, **arguments), 0.5)


def directory(folder):
    (folder / "folder.mp4").mkdir()
    return folder / "folder.mp4"


def dangling_link(folder):
    (folder / "link.mp4").symlink_to(folder / "nowhere.mp4")
    return folder / "link.mp4"


def pipe(folder):
    os.mkfifo(folder / "pipe.mp4")
    return folder / "pipe.mp4"


def file_as_folder(folder):
    return contents("clip.mp4", b"x")(folder) / "clip.mp4"


def song_with_a_cover(folder):
    """An mp3 file with a picture in its tag, which libav takes for a video stream."""
    cover = write_video(folder / "cover.png", "png", moving_frames(1)).read_bytes()
    sound = write_sound(folder / "song.mp3", "libmp3lame").read_bytes()
    picture = b"\0image/png\0\3\0" + cover
    frame = b"APIC" + struct.pack(">IH", len(picture), 0) + picture
    size = bytes(len(frame) >> shift & 0x7F for shift in (21, 14, 7, 0))
    return contents("cover.mp3", b"ID3\3\0\0" + size + frame + sound)(folder)


FASTSTART = {"container_options": {"movflags": "faststart"}}
BROKEN = {
    "missing": (lambda folder: folder / "missing.mp4", "no such file"),
    "directory": (directory, "is a directory"),
    "dangling link": (dangling_link, "no such file"),
    "pipe": (pipe, "is not a regular file"),
    "file as folder": (file_as_folder, "cannot be read: Not a directory"),
    "name too long": (lambda folder: folder / ("x" * 300), "cannot be read: File name too long"),
    "name with a null": (lambda folder: f"{folder}/a\0b", "cannot be read"),
    "empty": (contents("empty.mp4", b""), "is empty"),
    "text named txt": (contents("notes.txt", b"Some notes.\n" * 30), "is not a video or image"),
    "text named mp4": (contents("notes.mp4", b"Some notes.\n" * 30), "is not a video or image"),
    "one byte": (contents("byte.mp4", b"x"), "is not a video or image"),
    "web page": (contents("page.mp4", b"<!DOCTYPE html><html><body>404</body></html>"), "is not a video or image"),
    "zeros": (contents("zeros.mp4", bytes(10_000)), "is not a video or image"),
    "noise": (contents("noise.avi", random.Random(0).randbytes(50_000)), "is not a video or image"),
    "sound": (lambda folder: write_sound(folder / "sound.wav", "pcm_s16le"), "has no video stream, only audio"),
    "sound in mp4": (lambda folder: write_sound(folder / "sound.mp4", "aac"), "has no video stream, only audio"),
    "song with a cover": (song_with_a_cover, "has no video stream, only audio"),
    "no frames in avi": (lambda folder: write_video(folder / "none.avi", "mjpeg", []), "has no frames"),
    "no frames in mkv": (lambda folder: write_video(folder / "none.mkv", "libx264", []), "End of file"),
    "no frames in mp4": (
        lambda folder: write_video(folder / "none.mp4", "libx264", []),
        "has no (frames|video)",
    ),
    "mp4 without its index": (cut_clip("mp4", "libx264", 0.6), "is truncated: it has [0-9,]+ bytes of at least"),
    "mp4 with its index first": (cut_clip("mp4", "libx264", 0.6, **FASTSTART), "is truncated"),
    "mp4 without its last byte": (cut_clip("mp4", "libx264", 0.9999, **FASTSTART), "is truncated"),
    "mov": (cut_clip("mov", "prores_ks", 0.9), "is truncated"),
    "mkv": (cut_clip("mkv", "libx264", 0.6), "is truncated"),
    "mkv without its last byte": (cut_clip("mkv", "libx264", 0.9999), "is truncated"),
    "webm": (cut_clip("webm", "libvpx-vp9", 0.6), "is truncated"),
    "avi": (cut_clip("avi", "mpeg4", 0.6), "is truncated"),
    "gif": (cut_clip("gif", "gif", 0.6), "is truncated"),
    "gif without its last byte": (cut_clip("gif", "gif", 0.9999), "is truncated"),
    "header of mp4": (cut_clip("mp4", "libx264", 0.004), "is truncated|is not a video or image"),
    "header of mkv": (cut_clip("mkv", "libx264", 0.004), "is truncated|is not a video or image"),
    "header of gif": (cut_clip("gif", "gif", 0.0001), "is truncated|is not a video or image"),
    "png": (cut_still("png", "png"), "is corrupt"),
    "jpg": (cut_still("jpg", "mjpeg"), "is corrupt"),
    "webp": (cut_still("webp", "libwebp"), "is truncated"),
    "bmp": (cut_still("bmp", "bmp"), "is corrupt"),
    "header of png": (contents("a.png", b"\x89PNG\r\n\x1a\n"), "is (corrupt|not a video or image)|has no frames"),
    "noise in h264": (noise_in("mp4", "libx264", gop=40), "is corrupt"),
    "noise in h264 in mkv": (noise_in("mkv", "libx264", gop=40), "is corrupt"),
    "noise in jpeg in mkv": (noise_in("mkv", "mjpeg"), "is corrupt: the element at byte [0-9,]+ does not fit"),
    "noise in vp9": (noise_in("webm", "libvpx-vp9", gop=40), "is corrupt: the element at byte [0-9,]+ does not fit"),
    "noise in mpeg4": (noise_in("avi", "mpeg4", gop=40), "is corrupt"),
    "noise in jpeg in avi": (noise_in("avi", "mjpeg"), "is corrupt: the chunk at byte [0-9,]+ is damaged"),
    "noise in png": (noise_in("mov", "png"), "is corrupt"),
    "noise in jpeg": (noise_in("mov", "mjpeg"), "is corrupt"),
    "noise in av1": (noise_in("mp4", "libsvtav1", gop=40), "is corrupt"),
}


@pytest.mark.parametrize(("make", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken_files(tmp_path, capfd, make, reason):
    path = make(tmp_path)
    capfd.readouterr()
    with pytest.raises(VideoError, match=reason) as caught:
        load_video(path, num_frames=40)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert capfd.readouterr().err == ""


NOISY = [
    ("mkv", "libx264"),
    ("mkv", "mjpeg"),
    ("mkv", "libsvtav1"),
    ("webm", "libvpx"),
    ("webm", "libvpx-vp9"),
    ("avi", "libx264"),
    ("avi", "mpeg4"),
    ("avi", "mjpeg"),
    ("mp4", "libx264"),
    ("mov", "png"),
]


@pytest.mark.parametrize("part", [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.9])
@pytest.mark.parametrize(("extension", "codec"), NOISY)
def test_noise_loses_no_frames_in_silence(tmp_path, extension, codec, part):
    path = noise(clip(tmp_path, extension, codec, gop=40), part, seed=int(100 * part))
    totals = []

    def choose(total):
        totals.append(total)
        return range(total)

    try:
        frames = decode_frames(path, choose)
    except VideoError:
        return
    assert totals[-1] == 40
    assert np.array_equal(np.stack(frames), np.stack(decode_all(path)))


def is_corrupt(path):
    try:
        decode_frames(path, range)
    except VideoError:
        return True
    return False


@pytest.mark.parametrize(
    ("extension", "codec", "options"),
    [("mkv", "libx264", {}), ("mp4", "libx264", {"slices": "4"}), ("avi", "mpeg4", {}), ("mkv", "mpeg4", {"bf": "2"})],
)
def test_damage_is_noticed_however_many_threads_there_are(tmp_path, monkeypatch, extension, codec, options):
    path = clip(tmp_path, extension, codec, gop=40, options=options)
    data = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size > 60]
    verdicts = []
    for number, (position, size) in enumerate(packets[::3]):
        damaged = bytearray(data)
        middle = position + size // 2
        damaged[middle : middle + 20] = random.Random(number).randbytes(20)
        path.write_bytes(damaged)
        monkeypatch.setattr("torch.get_num_threads", lambda: 1)
        verdicts.append(is_corrupt(path))
        monkeypatch.setattr("torch.get_num_threads", lambda: 6)
        assert [is_corrupt(path) for _ in range(3)] == verdicts[-1:] * 3
    assert sum(verdicts) > len(verdicts) // 2


def test_damage_to_any_block_of_a_matroska_file_is_noticed(tmp_path):
    path = clip(tmp_path, "mkv", "mjpeg", gop=5)
    data = path.read_bytes()
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    assert len(positions) == 40
    for position in positions:
        for at, byte, reason in (
            (-2, 0x7F, "the element at byte [0-9,]+ does not fit into its place"),  # the size
            (0, 0x85, "the block at byte [0-9,]+ belongs to no track"),
            (3, 0x82, "the block at byte [0-9,]+ cannot be read"),  # several frames in one, of impossible sizes
        ):
            damaged = bytearray(data)
            damaged[position + at] = byte
            path.write_bytes(damaged)
            with pytest.raises(VideoError, match=reason):
                decode_frames(path, range)


def test_damage_to_any_chunk_of_an_avi_file_is_noticed(tmp_path):
    path = clip(tmp_path, "avi", "mjpeg")
    data = path.read_bytes()
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    assert len(positions) == 40
    for position in positions:
        for at in (-8, -3):  # the name and the size
            damaged = bytearray(data)
            damaged[position + at] ^= 0x11
            path.write_bytes(damaged)
            with pytest.raises(VideoError, match=f"the chunk at byte {position - 8:,} is damaged"):
                decode_frames(path, range)


def test_an_index_of_avi_without_care_does_no_harm(tmp_path):
    path = clip(tmp_path, "avi", "mjpeg")
    data = path.read_bytes()
    start = data.rindex(b"idx1") + 8
    index = [struct.unpack_from("<4sIII", data, at) for at in range(start, len(data), 16)]
    assert len(index) == 40
    base = data.index(b"movi")
    for shift in (base, 3, -4):  # counted from the start of the file, and from nowhere
        path.write_bytes(data[:start] + b"".join(struct.pack("<4sIII", n, f, at + shift, s) for n, f, at, s in index))
        assert read_frames(path, 5).shape == (5, 80, 96, 3)
    path.write_bytes(data.replace(b"idx1", b"JUNK"))
    assert read_frames(path, 5).shape == (5, 80, 96, 3)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="everything is permitted to root")
def test_permission_denied(tmp_path):
    path = clip(tmp_path, "mp4", "libx264")
    path.chmod(0)
    with pytest.raises(VideoError, match="permission denied"):
        read_frames(path, 1)


@pytest.mark.parametrize("extension", ["mp4", "gif", "avi"])
def test_what_follows_the_end_does_no_harm(tmp_path, extension):
    codec = {"mp4": "libx264", "gif": "gif", "avi": "mpeg4"}[extension]
    path = clip(tmp_path, extension, codec)
    frames = read_frames(path, 5)
    for extra in (b"\0", b"\0" * 100, b"appended by a careless program"):
        longer = tmp_path / f"longer.{extension}"
        longer.write_bytes(path.read_bytes() + extra)
        assert np.array_equal(read_frames(longer, 5).numpy(), frames.numpy())


def test_recordings_that_leave_their_length_open_are_not_truncated(tmp_path):
    for extension, codec, options in (
        ("mkv", "libx264", {"live": "1"}),
        ("webm", "libvpx-vp9", {"live": "1"}),
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    ):
        path = write_video(tmp_path / f"live.{extension}", codec, moving_frames(20), container_options=options)
        assert read_frames(path, 20).shape == (20, 80, 96, 3)


def test_seeking_over_damage_gives_the_frames_of_decoding_everything(tmp_path):
    path = clip(tmp_path, "mp4", "libx264", gop=5, **FASTSTART)
    data = path.read_bytes()
    start = data.index(b"mdat") + 8
    outcomes = {"same": 0, "error": 0}
    for number in range(12):
        damaged = bytearray(data)
        at = start + (len(data) - start) * number // 12 + 20
        damaged[at : at + 40] = random.Random(number).randbytes(40)
        path.write_bytes(damaged)
        try:
            frames = read_frames(path, 4).numpy()
        except VideoError:
            outcomes["error"] += 1
            continue
        everything = decode_all(path)
        assert np.array_equal(frames, np.stack([everything[index] for index in frame_indices(40, 4)]))
        outcomes["same"] += 1
    assert min(outcomes.values()) > 0
