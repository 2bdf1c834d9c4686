"""The structure of Matroska files: intact blocks are found, and damage is reported with its position."""

import io

import pytest

from mplug2_fast.video.limits import DamagedError, Guard
from mplug2_fast.video.matroska import find_blocks

OPEN = b"\x01" + b"\xff" * 7


def element(identifier, contents, size=None):
    """An element with a size of eight bytes."""
    return bytes.fromhex(identifier) + (size or (len(contents) | 1 << 56).to_bytes(8, "big")) + contents


def block(track=1, contents=b"frame", identifier="a3"):
    return element(identifier, bytes((0x80 | track, 0, 0, 0)) + contents)


def file_of(*clusters, end=b""):
    header = element("1a45dfa3", b"")
    tracks = element("1654ae6b", element("ae", element("d7", b"\1")) + element("ae", element("d7", b"\2")))
    return header + element("18538067", tracks + b"".join(clusters)) + end


def cluster(*elements, size=None):
    return element("1f43b675", element("e7", b"\0") + b"".join(elements), size)


def tracks_of_blocks(data):
    blocks = find_blocks(io.BytesIO(data), len(data), Guard())
    assert all(data[position + 4 :].startswith(b"frame") for position in blocks.positions)
    return list(blocks.tracks)


def test_blocks_are_found_with_their_tracks():
    group = element("a0", block(2, identifier="a1") + element("9b", b"\1"))
    assert tracks_of_blocks(file_of(cluster(block(), group), cluster(), cluster(block(2), block()))) == [1, 2, 2, 1]


def test_a_block_without_a_frame_does_not_count():
    assert tracks_of_blocks(file_of(cluster(block(contents=b""), block()))) == [1]


def test_what_is_unknown_is_passed_over():
    news = element("4321", b"of a later version")
    void = element("ec", bytes(100))
    everywhere = (void, news)
    assert tracks_of_blocks(file_of(*everywhere, cluster(*everywhere, block(), *everywhere), *everywhere)) == [1]


def test_what_follows_the_segment_does_not_count():
    for end in (b"\0", b"\xff" * 50, cluster(block())):
        assert tracks_of_blocks(file_of(cluster(block()), end=end)) == [1]


def test_open_sizes_end_the_search():
    assert tracks_of_blocks(file_of(cluster(block()), cluster(block(), size=OPEN), b"\0\0")) == [1]
    assert tracks_of_blocks(element("1a45dfa3", b"") + element("18538067", cluster(block()), OPEN)) == [1]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (element("a3", b"\x81\0\0\0frame", b"\x84"), "does not fit"),
        (element("a3", b"\x81\0\0\0frame", b"\xfe"), "does not fit"),
        (element("a3", b"\x81\0\0\0frame", OPEN), "does not fit"),
        (element("a3", b"\x81\0\0\0frame", b"\0"), "does not fit"),
        (element("05", b"", b"\x80"), "does not fit"),
        (element("b3", b"", b"\x80"), "does not fit"),  # an id that belongs elsewhere
        (element("ab", b"", b"\x89") + bytes(9), "does not fit"),  # a number of nine bytes
        (element("a0", block(identifier="a1") + b"\0"), "does not fit"),
        (block(3), "belongs to no track"),
        (b"\xa3", "does not fit"),
    ],
)
def test_what_does_not_fit_is_reported(wrong, reason):
    data = file_of(cluster(block(), wrong), cluster(block()))
    with pytest.raises(DamagedError, match=rf"^the (element|block) at byte [0-9,]+ {reason}") as caught:
        find_blocks(io.BytesIO(data), len(data), Guard())
    position = int(str(caught.value).split()[4].replace(",", ""))
    end = data.rindex(bytes.fromhex("1f43b675"))
    assert end - len(wrong) <= position <= end
