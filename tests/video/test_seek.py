"""Seeking: used where it pays, with the frames of decoding everything, and not used where it could be wrong."""

import struct

import av
import numpy as np
import pytest

from mplug2_fast.video import decode, frame_indices, seek
from mplug2_fast.video.decode import decode_frames
from mplug2_fast.video.limits import Guard
from tests.video.clips import decode_all, moving_frames, write_video

SEEKABLE = [
    ("mp4", "libx264", {}),
    ("mp4", "libx264", {"bf": "0"}),
    ("mkv", "libx264", {"bf": "3", "x264-params": "b-pyramid=strict"}),
    ("mp4", "libx265", {}),
    ("mkv", "libx265", {"x265-params": "open-gop=1:bframes=4:log-level=none"}),
    ("mkv", "libx265", {"x265-params": "open-gop=0:log-level=none"}),
    ("webm", "libvpx", {}),
    ("webm", "libvpx-vp9", {}),
    ("webm", "libvpx-vp9", {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "12"}),
    ("webm", "libsvtav1", {}),
    ("mp4", "libsvtav1", {}),
    ("mkv", "mjpeg", {}),
]


@pytest.fixture
def only_seeking(monkeypatch):
    def forbidden(*_):
        raise AssertionError("everything was decoded")

    monkeypatch.setattr(decode, "_decode_all", forbidden)


@pytest.fixture
def whatever_it_costs(monkeypatch):
    monkeypatch.setattr(seek, "_WORTH_IT", float("inf"))


@pytest.fixture
def whole_decodes(monkeypatch):
    """The names of files that were decoded whole."""
    names = []
    original = decode._decode_all

    def recording(name, *rest):
        names.append(name)
        return original(name, *rest)

    monkeypatch.setattr(decode, "_decode_all", recording)
    return names


def assert_frames(path, indices, everything):
    frames = decode_frames(path, lambda total: indices)
    assert len(frames) == len(indices)
    for frame, index in zip(frames, indices, strict=True):
        assert np.array_equal(frame, everything[index]), f"frame {index}"


@pytest.mark.parametrize(("extension", "codec", "options"), SEEKABLE)
def test_one_frame_and_several(tmp_path, only_seeking, whatever_it_costs, extension, codec, options):
    path = write_video(tmp_path / f"clip.{extension}", codec, moving_frames(40), gop=7, options=options)
    everything = decode_all(path)
    for index in range(40):
        assert_frames(path, [index], everything)
    for num_frames in (2, 5, 40, 45):
        assert_frames(path, frame_indices(40, num_frames), everything)
    assert_frames(path, [30, 2, 30, 9], everything)


def test_variable_frame_rate(tmp_path, only_seeking, whatever_it_costs):
    times = np.cumsum(np.random.default_rng(0).integers(5, 400, 40)).tolist()
    for extension in ("mp4", "mkv"):
        path = write_video(
            tmp_path / f"clip.{extension}", "libx264", moving_frames(40), gop=7, milliseconds=times, options={"bf": "2"}
        )
        everything = decode_all(path)
        assert len(everything) == 40
        for num_frames in (1, 4, 16):
            assert_frames(path, frame_indices(40, num_frames), everything)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_many_threads_give_the_same_frames(tmp_path, only_seeking, whatever_it_costs, monkeypatch, codec):
    path = write_video(tmp_path / "clip.mp4", codec, moving_frames(60), gop=7)
    everything = decode_all(path)
    monkeypatch.setattr("torch.get_num_threads", lambda: 5)
    assert_frames(path, frame_indices(60, 9), everything)


def test_seeking_is_chosen_where_it_saves_decoding(tmp_path, whole_decodes):
    frames = moving_frames(120)
    short = write_video(tmp_path / "short.mp4", "libx264", frames, gop=4)
    long = write_video(tmp_path / "long.mp4", "libx264", frames, gop=120)
    for path in (short, long):
        everything = decode_all(path)
        for num_frames in (1, 8):
            assert_frames(path, frame_indices(120, num_frames), everything)
    # One frame in the middle of a long group saves the second half of the file; eight save nothing.
    assert whole_decodes == [str(long)]


def test_open_gops_of_h264_are_decoded_whole(tmp_path, whole_decodes, whatever_it_costs):
    path = write_video(
        tmp_path / "clip.mp4", "libx264", moving_frames(60), gop=10, options={"x264-params": "open-gop=1:bframes=3"}
    )
    with av.open(str(path)) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) > 1
    assert_frames(path, frame_indices(60, 6), decode_all(path))
    scan = decode.scan_packets(str(path), Guard())
    assert sum(packet.fresh_start for packet in scan.packets) == 1


@pytest.mark.parametrize(
    ("extension", "codec"),
    [("avi", "libx264"), ("avi", "mpeg4"), ("h264", "libx264"), ("ts", "libx264"), ("ivf", "libvpx"), ("gif", "gif")],
)
def test_what_cannot_be_trusted_is_decoded_whole(tmp_path, whole_decodes, whatever_it_costs, extension, codec):
    path = write_video(tmp_path / f"clip.{extension}", codec, moving_frames(40), gop=5)
    assert_frames(path, frame_indices(40, 4), decode_all(path))
    assert whole_decodes == [str(path)]


def hide_frames(source, target, numbers):
    """Copies a VP8 video, telling the decoder not to show some of its frames."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if not packet.size:
                continue
            data = bytearray(bytes(packet))
            if number in numbers:
                assert data[0] & 0x10
                data[0] &= ~0x10
            copy = av.Packet(bytes(data))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            new.mux(copy)
    return target


@pytest.mark.parametrize("foretold", [True, False])
def test_hidden_frames_are_not_counted(tmp_path, whatever_it_costs, monkeypatch, foretold):
    source = write_video(tmp_path / "source.webm", "libvpx", moving_frames(40), gop=8)
    path = hide_frames(source, tmp_path / "clip.webm", {3, 12, 13, 30})
    everything = decode_all(path)
    assert len(everything) == 36
    if not foretold:  # as with codecs whose packets are not looked into
        monkeypatch.setattr(decode, "is_shown", lambda packet, codec: True)
        monkeypatch.setattr(seek, "_CODECS", ())
    assert decode.scan_packets(str(path), Guard()).shown == (36 if foretold else 40)
    for num_frames in (1, 7, 36, 40):
        assert_frames_of_file(path, num_frames, everything)


def assert_frames_of_file(path, num_frames, everything):
    frames = decode_frames(path, lambda total: frame_indices(total, num_frames))
    expected = [everything[index] for index in frame_indices(len(everything), num_frames)]
    assert np.array_equal(np.stack(frames), np.stack(expected))


def test_a_header_that_lies_about_the_number_of_frames(tmp_path):
    path = write_video(tmp_path / "clip.avi", "mjpeg", moving_frames(30))
    data = path.read_bytes()
    assert data.count(struct.pack("<I", 30)) >= 2
    path.write_bytes(data.replace(struct.pack("<I", 30), struct.pack("<I", 77)))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 77
    assert_frames_of_file(path, 8, decode_all(path))


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"\x82rest", True),  # a key frame
        (b"\x86rest", True),  # another frame
        (b"\x84rest", False),  # one that is not shown
        (b"\x88", True),  # the request to show an earlier one
        (b"\x84rest\x86rest\xc9\5\5\xc9", True),  # a frame that is not shown, one that is, and their index
    ],
)
def test_frames_of_vp9_that_are_not_shown(data, shown):
    assert seek.is_shown(av.Packet(data), "vp9") == shown


def remux(source, target, first_packet=0, shift=0, options=None):
    """Copies packets, without those before `first_packet`, shown `shift` ticks later."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options or {}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size and number >= first_packet:
                packet.pts += shift
                packet.dts += shift
                packet.stream = stream
                new.mux(packet)
    return target


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_a_video_that_starts_late(tmp_path, whatever_it_costs, extension):
    source = write_video(tmp_path / "source.mp4", "libx264", moving_frames(40), gop=8)
    path = remux(source, tmp_path / f"clip.{extension}", shift=25 * 512)
    everything = decode_all(path)
    assert len(everything) == 40
    for num_frames in (1, 5, 40):
        assert_frames_of_file(path, num_frames, everything)


def test_an_edit_list_that_cuts_the_start(tmp_path, whatever_it_costs):
    source = write_video(tmp_path / "source.mp4", "libx264", moving_frames(40), gop=8, options={"bf": "0"})
    path = remux(source, tmp_path / "clip.mp4", shift=-5 * 512, options={"avoid_negative_ts": "disabled"})
    with av.open(str(path)) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) == 5
    everything = decode_all(path)
    assert len(everything) == 35
    for num_frames in (1, 5, 35):
        assert_frames_of_file(path, num_frames, everything)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_video_cut_within_a_group_of_pictures(tmp_path, whatever_it_costs, codec):
    options = {"libx264": {"x264-params": "open-gop=1:bframes=3"}, "libx265": None}[codec]
    source = write_video(tmp_path / "source.mkv", codec, moving_frames(60), gop=10, options=options)
    with av.open(str(source)) as container:
        keys = [number for number, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    path = remux(source, tmp_path / "clip.mkv", first_packet=keys[1])
    everything = decode_all(path)
    for num_frames in (1, 5):
        assert_frames_of_file(path, num_frames, everything)
