"""Reads files of torch.save: the zip format, and the format before PyTorch 1.6. Weights are memory-mapped."""

from __future__ import annotations

import io
import lzma
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from mplug2_fast.checkpoint.pickles import MAX_PICKLE_BYTES, StoredTensor, WeightsUnpickler
from mplug2_fast.errors import CheckpointError

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
LEGACY_PROTOCOL = 1001

_MAX_DIRECTORY_BYTES = 16 * 2**20
_MAX_UNPACKED_BYTES, _MAX_RATIO = 256 * 2**20, 20
"""Compressed entries may unpack to this size, or to this ratio times the size of the file."""

BROKEN = (
    *(RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(ArithmeticError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    pickle.UnpicklingError,
)
"""Exceptions that reading a damaged pickle or archive may raise."""


class TorchFile(Protocol):
    """A file of torch.save: its object, with `StoredTensor` instead of tensors, and their storages."""

    content: Any

    def storage(self, key: str, itemsize: int) -> torch.UntypedStorage:
        """The storage of that name."""


def open_torch_file(path: Path, head: bytes) -> TorchFile:
    """Opens a file. Raises `CheckpointError`, without the path, if it is refused, or one of `BROKEN` if damaged."""
    return _LegacyFile(path) if head.startswith(LEGACY_MAGIC) else _ZipFile(path)


def tensor_of(file: TorchFile, stored: StoredTensor) -> torch.Tensor:
    """The tensor: a view of the mapped file unless it is stored compressed."""
    storage = file.storage(stored.storage.key, stored.dtype.itemsize)
    needed = stored.storage.numel * stored.storage.dtype.itemsize
    if storage.nbytes() < needed:
        raise ValueError(f"a storage has {storage.nbytes()} bytes instead of {needed}")
    tensor = torch.empty(0, dtype=stored.dtype)
    tensor.set_(storage, stored.offset, stored.size, stored.stride)  # raises if it exceeds the storage
    return tensor.neg() if stored.negated else tensor


class _ZipFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size
        if not zipfile.is_zipfile(path):
            raise CheckpointError("truncated: a torch.save file without its end; download it again")
        self._archive = zipfile.ZipFile(_BoundedReads(path))
        self._entries = {entry.filename: entry for entry in self._archive.infolist()}
        self._cache: dict[str, torch.UntypedStorage] = {}
        self._unpacked = 0
        self._check_entries()
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl" if not pickles else "it has several data.pkl")
        self._folder = pickles[0].removesuffix("data.pkl")
        if f"{self._folder}constants.pkl" in self._entries:
            raise CheckpointError("a TorchScript archive, which is a program; save the model's state_dict instead")
        self._check_byte_order()
        self.content = WeightsUnpickler(io.BytesIO(self._read(pickles[0], MAX_PICKLE_BYTES))).load()

    def storage(self, key: str, itemsize: int) -> torch.UntypedStorage:
        if key not in self._cache:
            entry = self._entries[f"{self._folder}data/{key}"]
            start = self._start(entry)
            if entry.compress_type == zipfile.ZIP_STORED and start % itemsize == 0:
                self._cache[key] = self._mapped[start : start + entry.file_size]
            else:
                data = bytearray(self._read(entry.filename))
                self._cache[key] = torch.frombuffer(data or bytearray(1), dtype=torch.uint8).untyped_storage()
        return self._cache[key]

    @cached_property
    def _mapped(self) -> torch.UntypedStorage:
        return torch.UntypedStorage.from_file(str(self._path), False, self._size)

    def _check_entries(self) -> None:
        entries = sorted(self._archive.infolist(), key=lambda entry: entry.header_offset)
        if len(self._entries) < len(entries):
            raise ValueError("two of its entries have the same name")
        end = 0
        for entry in entries:
            if entry.flag_bits & 1:
                raise CheckpointError("its entries are encrypted; unpack it, and pack it without a password")
            if entry.header_offset < end:
                raise ValueError("its entries overlap")
            end = entry.header_offset + 30 + len(entry.orig_filename) + entry.compress_size
            if end > self._size or (
                entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size
            ):
                raise ValueError("the size of an entry differs from the archive's directory")

    def _check_byte_order(self) -> None:
        name = f"{self._folder}byteorder"
        order = self._read(name, 16).decode() if name in self._entries else "little"
        if order != sys.byteorder:
            raise CheckpointError(
                f"its numbers are {order}-endian; load and save it on a {sys.byteorder}-endian machine"
            )

    def _start(self, entry: zipfile.ZipInfo) -> int:
        with self._path.open("rb") as stream:
            stream.seek(entry.header_offset)
            header = stream.read(30)
        if header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile("an entry has no header")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + entry.compress_size > self._size:
            raise ValueError("an entry is outside of the file")
        return start

    def _read(self, name: str, limit: int | None = None) -> bytes:
        """The bytes of an entry."""
        entry = self._entries[name]
        if limit is not None and entry.file_size > limit:
            raise CheckpointError(
                f"its {name.split('/')[-1]} has {entry.file_size:,} bytes, more than any checkpoint has; "
                "save the state dict alone"
            )
        if entry.compress_type == zipfile.ZIP_STORED and entry.CRC == 0:  # torch.save can omit the checksum
            with self._path.open("rb") as stream:
                stream.seek(self._start(entry))
                return stream.read(entry.file_size)
        self._unpacked += entry.file_size
        if self._unpacked > max(_MAX_UNPACKED_BYTES, _MAX_RATIO * self._size):
            raise CheckpointError(
                f"its compressed entries unpack to more than {_MAX_RATIO} times its size; use a file written by "
                "torch.save"
            )
        with self._archive.open(entry) as stream:
            data = stream.read(entry.file_size + 1)
        if len(data) != entry.file_size:
            raise ValueError("the size of an entry differs from the archive's directory")
        return data


class _LegacyFile:
    """Pickles one after another (magic number, protocol, system, object, names of storages), then the storages."""

    def __init__(self, path: Path) -> None:
        self._path = path
        size = path.stat().st_size
        with path.open("rb") as stream:
            _, protocol, system = (WeightsUnpickler(stream).load() for _ in range(3))
            unpickler = WeightsUnpickler(stream)
            self.content, keys = unpickler.load(), WeightsUnpickler(stream).load()
            if protocol != LEGACY_PROTOCOL or not isinstance(system, Mapping) or not isinstance(keys, list):
                raise ValueError("its header is not that of torch.save")
            if system.get("little_endian") is not (sys.byteorder == "little"):
                raise CheckpointError(
                    f"it has another byte order than this machine; save it on a {sys.byteorder}-endian machine"
                )
            self._spans: dict[str, tuple[int, int]] = {}
            for key in map(str, keys):
                (numel,) = struct.unpack("<q", stream.read(8))
                start = stream.tell()
                length = numel * unpickler.storages[key].dtype.itemsize
                if numel != unpickler.storages[key].numel or key in self._spans:
                    raise ValueError("the size of a storage differs from its tensors'")
                if start + length > size:
                    raise EOFError("it ends too early")
                self._spans[key] = (start, start + length)
                stream.seek(start + length)

    def storage(self, key: str, itemsize: int) -> torch.UntypedStorage:
        start, end = self._spans[key]
        mapped = self._mapped[start:end]
        return mapped if start % itemsize == 0 else mapped.clone()

    @cached_property
    def _mapped(self) -> torch.UntypedStorage:
        return torch.UntypedStorage.from_file(str(self._path), False, self._path.stat().st_size)


class _BoundedReads(io.FileIO):
    """A file that limits the size of reads, so that a damaged archive directory cannot fill the memory."""

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("its directory is larger than that of any checkpoint")
        return super().read(size)
