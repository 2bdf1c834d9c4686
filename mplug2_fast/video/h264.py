"""Checks whether an H.264 packet holds one field of a picture instead of a whole picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_SLICES = (1, 5)
_SEQUENCE = 7
# Profiles whose parameters contain the colour format.
_HIGH = frozenset((100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135))


@dataclass(frozen=True)
class Sequence:
    """The parameters of a sequence that are needed to read the header of a slice."""

    may_have_fields: bool
    frame_number_bits: int
    separate_planes: bool


def read_sequence(unit: bytes | memoryview) -> Sequence | None:
    """The parameters in a unit, which begins with its header; None if they are invalid."""
    try:
        return _read_sequence(_Bits(unit[1:]))
    except IndexError:
        return None


def _read_sequence(bits: _Bits) -> Sequence:
    profile = bits.number(8)
    bits.number(16)
    bits.golomb()
    separate_planes = False
    if profile in _HIGH:
        chroma = bits.golomb()
        if chroma == 3:
            separate_planes = bool(bits.number(1))
        bits.golomb()
        bits.golomb()
        bits.number(1)
        if bits.number(1):
            for index in range(8 if chroma != 3 else 12):
                if bits.number(1):
                    _skip_scaling_list(bits, 16 if index < 6 else 64)
    frame_number_bits = bits.golomb() + 4
    order = bits.golomb()
    if order == 0:
        bits.golomb()
    elif order == 1:
        bits.number(1)
        bits.golomb()
        bits.golomb()
        for _ in range(bits.golomb()):
            bits.golomb()
    bits.golomb()
    bits.number(1)
    bits.golomb()
    bits.golomb()
    return Sequence(not bits.number(1), frame_number_bits, separate_planes)


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.golomb()
            following = (last + (-(code // 2) if code % 2 == 0 else code // 2 + 1)) % 256
        last = following or last


class FieldCheck:
    """Finds packets that hold one field."""

    def __init__(self, extradata: bytes) -> None:
        self._sequence: Sequence | None = None
        if extradata[:1] == b"\1" and len(extradata) > 8:
            self._sequence = read_sequence(extradata[8 : 8 + int.from_bytes(extradata[6:8], "big")])

    @property
    def fields_possible(self) -> bool:
        return self._sequence is not None and self._sequence.may_have_fields

    def holds_one_field(self, units: Iterable[memoryview]) -> bool:
        """Whether all slices among the units of a packet belong to the same field."""
        fields = set()
        for unit in units:
            kind = unit[0] & 31
            if kind == _SEQUENCE:
                self._sequence = read_sequence(unit[:4096]) or self._sequence
            elif kind in _SLICES and self.fields_possible:
                fields.add(_field(unit, self._sequence))
        return fields in ({0}, {1})


def _field(unit: memoryview, sequence: Sequence) -> int | None:
    """0 for the top field, 1 for the bottom field, None for a whole picture."""
    bits = _Bits(unit[1:40])
    try:
        for _ in range(3):
            bits.golomb()
        if sequence.separate_planes:
            bits.number(2)
        bits.number(sequence.frame_number_bits)
        return bits.number(1) if bits.number(1) else None
    except IndexError:
        return None


class _Bits:
    """Reads numbers of any size in bits. Skips the bytes that prevent start codes within the data."""

    def __init__(self, data: bytes | memoryview) -> None:
        data = bytes(data).replace(b"\0\0\3", b"\0\0")
        self._bits = "".join(f"{byte:08b}" for byte in data[:4096])
        self._position = 0

    def number(self, size: int) -> int:
        end = self._position + size
        if end > len(self._bits):
            raise IndexError
        self._position, start = end, self._position
        return int(self._bits[start:end] or "0", 2)

    def golomb(self) -> int:
        one = self._bits.find("1", self._position)
        if one < 0 or one - self._position > 32:
            raise IndexError
        zeros = one - self._position
        self._position = one
        return self.number(zeros + 1) - 1
