"""How beam attention splits a memory."""

import pytest

pytest.importorskip("triton")

from mplug2_fast.kernels.beam_attention import _WAVES, part_length


@pytest.mark.parametrize("k_len", [0, 1, 65, 257, 1100, 4097, 5000])
@pytest.mark.parametrize("programs", [1, 12, 16, 512])
def test_parts_fill_the_device_and_are_not_too_short(k_len, programs):
    length = part_length(k_len, programs, 132)
    parts = -(-k_len // length)
    assert length % 64 == 0
    assert parts <= 64
    assert parts * programs <= max(programs, _WAVES * 132)
    if parts > 1:
        assert length >= 128
        assert k_len < parts * (length + 64)
    if k_len >= 4097 and programs in (12, 16):
        assert parts * programs >= 2 * 132
