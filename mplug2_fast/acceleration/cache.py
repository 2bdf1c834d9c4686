"""What a decoder keeps from one call to the next, and how it checks that it may use it.

Official generation calls the decoder at every step with the whole prefix of all beams, and with the memory tiled over
the beams. Only the values show that a call continues an earlier one, so values are compared:

- the rows of the memory with those of the last call. Each distinct row is a video, whose cross-attention keys and
  values are kept once;
- the prefixes with those of the last call. Beam search reorders beams, so each row looks for the row that it continues
  and reuses that row's keys, values and results.

A call with another memory, or with prefixes that continue nothing, drops everything. A call that starts with several
tokens may not be a generation, so only small tensors are kept from it.

Weights are also compared with those of the last call, by checksum or by value: PyTorch's version counter misses writes
through `.data`, NumPy or fused optimizers. Results of other weights are computed again. A step's products compute the
checksums of the weights that they read, so a step is compared after it was computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mplug2_fast.ops.checksum import ReadWeights, checksum, is_readable

_FINGERPRINT_TOKENS, _FINGERPRINT_CHANNELS = 64, 4


@dataclass(frozen=True)
class Record:
    """What one layer or the head computed in the last call, for all rows and tokens.

    Attributes:
        weights: the values of its parameters.
        x, out: copies of input and result, `(rows, tokens, ...)`, because callers may write to theirs.
        kept: further tensors that the layer needs.
        visible: `(rows, tokens)`, which tokens are not padding; None for all.
        index: the video of each row; None without a memory.
    """

    weights: Values
    x: Tensor
    out: Tensor
    kept: tuple[Tensor, ...] = ()
    visible: Tensor | None = None
    index: tuple[int, ...] | None = None


@dataclass
class Videos:
    """The distinct rows of a memory.

    Attributes:
        memory: `(videos, tokens, channels)`.
        visible: `(videos, tokens)`, or None for all.
        fingerprint: of each row, see `_fingerprint`.
        records: by the id of the layer.
    """

    memory: Tensor
    visible: Tensor | None
    fingerprint: Tensor
    records: dict[int, Record] = field(default_factory=dict)


@dataclass(frozen=True)
class _Seen:
    """The last call's memory: its checksum, or None if it cannot be read, its videos, and the video of each row."""

    checksum: tuple[Any, ...] | None
    videos: Videos
    index: tuple[int, ...]


class Session:
    """The caches of one decoder."""

    def __init__(self) -> None:
        self._seen: _Seen | None = None  # replaced as a whole, because another thread may call the decoder

    def drop(self) -> None:
        self._seen = None

    @property
    def is_empty(self) -> bool:
        return self._seen is None

    def __reduce__(self) -> Any:  # copies and pickles of a decoder start empty
        return (Session, ())

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call of the decoder. Inside it, layers and head may use what is kept."""
        token = _current.set(Call(self))
        try:
            yield
        finally:
            _current.reset(token)

    def find(self, memory: Tensor, visible: Tensor | None) -> tuple[Videos, tuple[int, ...]]:
        """The videos of a tiled memory `(rows, tokens, channels)`, and the video of each row."""
        seen, found = self._seen, _checksum((memory,))
        if seen is not None:
            same = found is not None and seen.checksum == found
            index = seen.index if same else _match(memory, seen.videos)
            if index is None or not _same_padding(visible, seen.videos.visible, index):
                self._seen = seen = None
        if seen is None:
            videos, index = _different_rows(memory, visible)
        else:
            videos = seen.videos
        self._seen = _Seen(found, videos, index)
        return videos, index


_current: ContextVar[Call | None] = ContextVar("mplug2_fast_decoder_call", default=None)


class Call:
    """What layers share within one call of a decoder, which passes the same memory and mask to all of them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.videos: Videos | None = None
        self.masks: dict[tuple[Any, ...], tuple[Tensor, Tensor, Any]] = {}
        self._given: tuple[Any, ...] = ()
        self._index: tuple[int, ...] = ()
        self._parents: list[int] | None = None
        self._searched = False

    @staticmethod
    def current(session: Session | None) -> Call | None:
        """The current call, if it belongs to that session and may use caches."""
        call = _current.get()
        return call if call is not None and call.session is session and not torch.is_grad_enabled() else None

    def find(self, memory: Tensor, visible: Tensor | None) -> tuple[Videos, tuple[int, ...]] | None:
        """`Session.find`, once per call. None for a second memory within one call."""
        if self.videos is None:
            self.videos, self._index = self.session.find(memory, visible)
            self._given = (memory, _writes(memory), visible)
        elif memory is not self._given[0] or _writes(memory) != self._given[1] or not _equal(visible, self._given[2]):
            return None
        return self.videos, self._index

    def parents(self, record: Record | None, x: Tensor, visible: Tensor | None, index: Any) -> list[int] | None:
        """For each row of x `(rows, tokens, channels)`, the row of the record that it continues. None if a row does not
        continue any.

        The first layer searches; the others only check its result, so that they do not mix up beams that are equal so
        far.
        """
        if not self._searched:
            self._searched = True
            self._parents = None if record is None else _search(record, x, index)
        parents = self._parents
        if parents is None or record is None or record.x.shape[1] >= x.shape[1]:
            return None
        length = record.x.shape[1]
        if not torch.equal(x[:, :length], record.x[parents]):
            return None
        if index is not None and index != tuple(record.index[parent] for parent in parents):
            return None
        before = None if record.visible is None else record.visible[parents]
        now = None if visible is None else visible[:, :length]
        return parents if _equal(now, before) else None

    def is_generation(self, x: Tensor) -> bool:
        """Whether the call looks like a step of generation, so that keeping large tensors pays: x `(rows, tokens,
        channels)` has one token or continues the last call. Whole sentences, as for a loss, usually do neither."""
        return x.shape[1] == 1 or self._parents is not None


class Values:
    """The values of tensors at one time: checksums, or copies if they cannot be read, as on a GPU.

    Args:
        read: the checksums that products have computed.
    """

    def __init__(self, tensors: Sequence[Tensor], read: ReadWeights | None = None) -> None:
        devices = sorted({tensor.device.type for tensor in tensors})
        autocast = [torch.get_autocast_dtype(each) if torch.is_autocast_enabled(each) else None for each in devices]
        self._kinds = (*autocast, *((tensor.dtype, tensor.shape, tensor.device) for tensor in tensors))
        self._checksum = _checksum(tensors, read)
        self._bytes = _bytes(tensors) if self._checksum is None else ()

    def same(self, other: Values) -> bool:
        if self._kinds != other._kinds or self._checksum != other._checksum:
            return False
        return all(torch.equal(a, b) for a, b in zip(self._bytes, other._bytes, strict=True))


def _checksum(tensors: Sequence[Tensor], read: ReadWeights | None = None) -> tuple[Any, ...] | None:
    """Identifies the values of tensors; None if their memory cannot be read."""
    if not all(map(is_readable, tensors)):
        return None
    read = ReadWeights() if read is None else read
    matrices = [read.checksum(tensor) for tensor in tensors if tensor.dim() == 2]
    others = checksum([tensor for tensor in tensors if tensor.dim() != 2])
    return *((tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors), *matrices, others


def _bytes(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of the tensors' bytes, joined per device so that comparing them takes few calls."""
    devices = dict.fromkeys(tensor.device for tensor in tensors)
    flat = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
    return tuple(torch.cat([each for each in flat if each.device == device]) for device in devices)


def _writes(tensor: Tensor) -> int:
    """PyTorch's version counter; -1 for inference tensors, which have none."""
    return -1 if tensor.is_inference() else tensor._version


def _search(record: Record, x: Tensor, index: Any) -> list[int] | None:
    """For each row of x, a row of the record with the same prefix and video, compared by a few channels."""
    length = record.x.shape[1]
    if length >= x.shape[1] or record.x.shape[2] != x.shape[2] or record.x.dtype != x.dtype:
        return None
    few = slice(None, None, max(1, x.shape[2] // _FINGERPRINT_CHANNELS))
    new, old = x[:, :length, few].flatten(1), record.x[:, :, few].flatten(1)
    alike = (new[:, None] == old[None]).all(dim=-1)
    if index is not None:
        rows, known = (torch.tensor(i, device=x.device) for i in (index, record.index))
        alike &= rows[:, None] == known[None]
    return alike.int().argmax(dim=1).tolist() if bool(alike.any(dim=1).all()) else None


def _fingerprint(memory: Tensor) -> Tensor:
    """`(rows, few)`: some channels of some tokens, which differ for most distinct rows."""
    tokens, channels = memory.shape[1] // _FINGERPRINT_TOKENS, memory.shape[2] // _FINGERPRINT_CHANNELS
    return memory[:, :: max(1, tokens), :: max(1, channels)].flatten(1)


def _match(memory: Tensor, videos: Videos) -> tuple[int, ...] | None:
    known = videos.memory
    if memory.shape[1:] != known.shape[1:] or memory.dtype != known.dtype or memory.device != known.device:
        return None
    alike = (_fingerprint(memory)[:, None] == videos.fingerprint[None]).all(dim=-1).cpu()
    first = alike.int().argmax(dim=1)
    if bool(alike.any(dim=1).all()) and torch.equal(memory, known[first]):
        return tuple(first.tolist())
    index = [_equal_row(row, known, like.nonzero()) for row, like in zip(memory, alike, strict=True)]
    return None if None in index else tuple(index)  # type: ignore[arg-type]


def _different_rows(memory: Tensor, visible: Tensor | None) -> tuple[Videos, tuple[int, ...]]:
    fingerprint = _fingerprint(memory)
    alike = (fingerprint[:, None] == fingerprint[None]).all(dim=-1)
    if visible is not None:
        alike &= (visible[:, None] == visible[None]).all(dim=-1)
    alike = alike.cpu()
    different: list[int] = []
    index = []
    for row in range(memory.shape[0]):
        candidates = [i for i in different if alike[row, i]]
        found = _equal_row(memory[row], memory, candidates)
        if found is None:
            different.append(row)
        index.append(len(different) - 1 if found is None else different.index(found))
    videos = Videos(memory[different], None if visible is None else visible[different], fingerprint[different])
    return videos, tuple(index)


def _equal_row(row: Tensor, rows: Tensor, candidates: Iterable[Any]) -> int | None:
    return next((int(i) for i in candidates if torch.equal(row, rows[int(i)])), None)


def _same_padding(visible: Tensor | None, known: Tensor | None, index: tuple[int, ...]) -> bool:
    return _equal(visible, None if known is None else known[list(index)])


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two masks are equal; None means all ones."""
    if a is None or b is None:
        return all(mask is None or bool(mask.all()) for mask in (a, b))
    return torch.equal(a, b)
