"""Files that claim more than they contain: each gives one error, before memory is allocated for the claim."""

import errno
import functools
import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import closing

import pytest

from mplug2_fast import VideoError
from mplug2_fast.video import DecodePool, Limits, VideoReader, load_video
from mplug2_fast.video.decode import decode_frames
from mplug2_fast.video.limits import Guard, LimitedFile
from tests.video import mutations
from tests.video.clips import moving_frames, write_video


def box(kind, *contents):
    data = b"".join(contents)
    return struct.pack(">I4s", 8 + len(data), kind) + data


def gif(size, frames=1):
    """Frames of one pixel on a screen of `size` pixels squared."""
    frame = b"\x21\xf9\x04\x04\x04\0\0\0\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    header = b"GIF89a" + struct.pack("<HHBBB", size, size, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return header + frame * frames + b";"


def matroska(contents, size):
    """A segment that begins with these contents and claims to hold `size` bytes."""
    return b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67" + (size | 1 << 56).to_bytes(8, "big") + contents


def frames_claimed(folder, count):
    """An mp4 file whose tables claim frames of one byte."""
    data = bytearray(write_video(folder / "whole.mp4", "libx264", moving_frames(10)).read_bytes())
    for table, values in (("stsz", (1, count)), ("stts", (1, count, 512)), ("stsc", (1, 1, count, 1)), ("stco", (1,))):
        at = data.index(table.encode()) + 8
        data[at : at + 4 * len(values)] = struct.pack(f">{len(values)}I", *values)
    return bytes(data)


def fragment_claimed(folder, count):
    """A fragment that claims frames without an entry for each."""
    path = write_video(
        folder / "whole.mp4", "libx264", moving_frames(4), container_options={"movflags": "frag_keyframe+empty_moov"}
    )
    data = path.read_bytes()
    run = box(b"trun", struct.pack(">II", 0, count))
    moof = box(b"moof", box(b"mfhd", bytes(8)), box(b"traf", box(b"tfhd", struct.pack(">II", 0x20000, 1)), run))
    return data[: data.index(b"moof") - 4] + moof + box(b"mdat", b"x" * 100)


def edits_claimed(folder, count):
    """An edit list that shows all frames many times."""
    data = write_video(folder / "whole.mp4", "libx264", moving_frames(10)).read_bytes()
    start, size = data.index(b"stsz") + 4, 3 * 10**6
    table = box(b"stsz", bytes(8), struct.pack(">I", size), bytes(4 * size))
    edits = box(b"edts", box(b"elst", bytes(4), struct.pack(">I", count), struct.pack(">IiI", 1, 0, 65536) * count))
    stbl = box(b"mdia", box(b"minf", box(b"stbl", table)))
    assert start
    return box(b"ftyp", b"isom", bytes(4)) + box(b"moov", box(b"trak", stbl, edits))


def picture_of_tiles():
    entry = box(b"infe", b"\2\0\0\0", struct.pack(">HH", 1, 0), b"grid\0")
    items = box(b"pitm", bytes(4), b"\0\1"), box(b"iinf", bytes(4), b"\0\1", entry)
    return box(b"ftyp", b"heic", bytes(4), b"mif1heic") + box(b"meta", bytes(4), *items)


HOSTILE = {
    "screen of a gif": (lambda _: gif(46_000), "has frames of 46,000x46,000 pixels, more than 134,217,728 in total"),
    "frames of an mp4": (lambda folder: frames_claimed(folder, 20_000_000), "claims 20,000,000 frames of 1 bytes, but"),
    "frames of a fragment": (lambda folder: fragment_claimed(folder, 2**31), "claims more than 16,777,216 frames"),
    "edits": (lambda folder: edits_claimed(folder, 1000), "claims more than 16,777,216 frames"),
    "items of a picture": (
        lambda _: box(b"ftyp", b"heic", bytes(4)) + box(b"meta", bytes(4), box(b"iinf", b"\1\0\0\0", b"\xff" * 24)),
        "the table iinf claims 4,294,967,295 entries",
    ),
    "nested boxes": (
        lambda _: box(b"ftyp", b"qt  ") + b"".join(struct.pack(">I4s", 8 * (500 - n), b"moov") for n in range(500)),
        "nested more than 16 deep",
    ),
    "compressed header": (
        lambda _: (
            box(b"ftyp", b"qt  ")
            + box(b"moov", box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", b"\xff" * 4, b"x" * 50)))
        ),
        "has a compressed header of 4,294,967,295 bytes",
    ),
    "blocks of a gif": (lambda _: b"GIF89a" + bytes(7) + b"\x21\xf9" + b"\x01\x00" * 2**21, "parts in its container"),
    "voids of an mkv": (lambda _: matroska(b"\xec\x80" * 2**17, 2**18), "parts in its container"),
    "junk of an avi": (
        lambda _: b"RIFF" + struct.pack("<I", 2**20) + b"AVI " + b"JUNK\0\0\0\0" * 2**17,
        "parts in its container",
    ),
    "animated webp": (
        lambda _: b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X\x0a\0\0\0\x02" + bytes(9),
        "is an animated WebP file, which is not supported",
    ),
    "tiles": (lambda _: picture_of_tiles(), "is a picture that consists of tiles, which is not supported"),
    "list of files": (lambda _: b"ffconcat version 1.0\nfile fifo.ts\n", "is not a video or image"),
    "playlist": (lambda _: b"#EXTM3U\n#EXTINF:10,\nfifo.ts\n#EXT-X-ENDLIST\n", "is not a video or image"),
    "metadata": (lambda _: b";FFMETADATA1\ntitle=x\n", "is not a video or image"),
    "session": (lambda _: b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 5004 RTP/AVP 96\n", "is not a video or image"),
}


@pytest.mark.parametrize(("make", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_claims_are_refused(tmp_path, monkeypatch, make, reason):
    os.mkfifo(tmp_path / "fifo.ts")  # whoever opens it waits
    path = tmp_path / "hostile.mp4"
    path.write_bytes(make(tmp_path))
    # The number of parts follows from this one; so a small file shows it.
    guard = Guard(Limits(frames=2**22 if "16,777,216" in reason else 2**16))
    with pytest.raises(VideoError, match=reason) as caught:
        decode_frames(path, range, threads=1, image_size=32, guard=guard)
    assert "\n" not in str(caught.value)


SPARSE = {
    "avi": b"RIFF" + struct.pack("<I", 2**32 - 10) + b"AVI ",
    "mkv": matroska(b"\x1f\x43\xb6\x75\x01\0\0\0\xff\xff\xff\xe0", 2**32),
    "gif": b"GIF89a" + bytes(7) + b"\x21\xf9",
    "mp4": b"",
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0\0\0\1\0\x08\x02\0\0\0",
    "ts": b"\x47",
    "wav": b"RIFF\xff\xff\xff\xffWAVE",
}


@pytest.mark.parametrize("extension", SPARSE)
def test_sparse_files_take_little_memory(tmp_path, extension):
    path = tmp_path / f"sparse.{extension}"
    path.write_bytes(SPARSE[extension])
    os.truncate(path, 2**34)
    with pytest.raises(VideoError):
        decode_frames(path, range, threads=1, image_size=32, guard=Guard(Limits(memory=2**27)))


def test_limits_can_be_raised_and_lowered(tmp_path):
    path = write_video(tmp_path / "clip.mkv", "mjpeg", moving_frames(20))
    for limits, reason in (
        (Limits(pixels=5000), r"more than 5,000 (pixels )?in total[;:] raise Limits\.pixels"),
        (Limits(frames=19), "has more than 19 frames; raise Limits.frames"),
        (Limits(memory=2**20), "needs more than 0.000977 GiB of memory to decode; raise Limits.memory"),
        (Limits(seconds=1e-9), "takes too long: stopped after 1e-09 s; raise Limits.seconds"),
    ):
        for read in (lambda x: load_video(path, 4, 32, limits=x), lambda x: VideoReader(path, limits=x).size):
            with pytest.raises(VideoError, match=reason):
                read(limits)
    assert load_video(path, 4, 32, limits=Limits(None, None, None, None)).shape == (3, 4, 32, 32)
    with pytest.raises(ValueError, match="pixels must be a positive number"):
        Limits(pixels=0)


def test_a_worker_that_needs_too_much_memory_says_so(tmp_path):
    path = tmp_path / "large.gif"
    path.write_bytes(gif(9000))
    with DecodePool(1, num_frames=1, image_size=32, limits=Limits(memory=2**29)) as pool:
        (clip,) = pool.clips([path])
    assert "needs more than 0.5 GiB of memory" in str(clip.error)


def test_time_is_limited_between_frames(tmp_path):
    path = tmp_path / "slow.gif"
    path.write_bytes(gif(2000, 3000))
    started = time.monotonic()
    with pytest.raises(VideoError, match=r"takes too long: stopped after 0\.5 s"):
        decode_frames(path, range, threads=1, image_size=32, guard=Guard(Limits(seconds=0.5)))
    assert time.monotonic() - started < 60


def test_ctrl_c_ends_a_command_that_decodes(tmp_path):
    path = tmp_path / "slow.gif"
    path.write_bytes(gif(4000, 5000))
    command = [sys.executable, "-m", "mplug2_fast", "caption", str(path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Tests that a shell runs in the background ignore Ctrl-C, and so would the command.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    pids = []
    for _ in range(1200):
        pids = [int(pid) for task in os.listdir(f"/proc/{process.pid}/task") for pid in _children(process.pid, task)]
        if pids:
            break
        time.sleep(0.1)
    assert pids, f"no worker in {children}"
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def _children(pid, task):
    try:
        with open(f"/proc/{pid}/task/{task}/children") as file:
            return file.read().split()
    except OSError:
        return []


def test_mutated_files_are_accounted_for(tmp_path):
    found = mutations.check(tmp_path, 48)
    assert found["files"] == 48
    assert 0 < found["decoded"] < 48


def test_a_container_may_name_a_position_before_its_start(tmp_path):
    path = tmp_path / "a.nut"
    path.write_bytes(b"0123")
    with closing(LimitedFile(str(path), Guard(Limits()))) as file:
        assert file.seek(-1) == -errno.EINVAL
        assert file.seek(2) == 2
        assert file.read(9) == b"23"


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def read(file, size):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = write_video(tmp_path / "a.nut", "ffv1", moving_frames(3))
    monkeypatch.setattr(LimitedFile, "read", read)
    with pytest.raises(VideoError, match=rf"^{path}: is .*\(Input/output error\)$"):
        load_video(path, 2, 32)
