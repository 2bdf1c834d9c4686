"""Reads the pickles of torch.save without running any code that they name.

Tensors become `StoredTensor` records. A few harmless classes become inert objects. All other names are refused. The
numbers of bytes and instructions are limited, and so is the memory that each instruction may allocate.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

MAX_PICKLE_BYTES = 64 * 2**20
MAX_READS = 3_000_000
"""Maximum number of instructions and arguments. The Large model with momentum copies and AdamW has 0.9 million."""

STORAGE_DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
_TORCH_VALUES = (torch.dtype, torch.layout, torch.qscheme)
_QUANTISED = frozenset(dtype for name, dtype in STORAGE_DTYPES.items() if name.startswith("Q"))

_INERT_MODULES = frozenset({"numpy", "pathlib", "datetime"})
_INERT_NAMES = frozenset(
    {("_codecs", "encode"), ("torch", "device"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
    | {("collections", name) for name in ("Counter", "defaultdict", "deque")}
    | {("builtins", name) for name in ("set", "frozenset", "bytearray", "complex", "slice", "range", "list", "dict")}
    | {("builtins", name) for name in ("tuple", "int", "float", "str", "bool", "bytes")}
)


class RefusedError(pickle.UnpicklingError):
    """The pickle names something that could run code."""


@dataclass(frozen=True)
class Storage:
    """The memory of tensors: `numel` elements of `dtype`, stored under `key`."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file, not read yet."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    negated: bool = False


@dataclass(frozen=True)
class OtherTensor:
    """A tensor of a kind that weights cannot have, such as "sparse"."""

    kind: str


class Inert:
    """Replaces an object that nobody reads, such as NumPy's random state."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Iterable[Any]) -> None:
        pass


class WeightsUnpickler(pickle._Unpickler):
    """Reads one pickle from a stream. Afterwards the stream is at the byte behind the pickle.

    Raises `RefusedError` for a name that could run code, `pickle.UnpicklingError` for exceeded limits, and any error
    that Python raises for damaged pickles.

    Attributes:
        storages: name -> storage, for each storage that was read.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(_Bounded(stream), encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        if (module, name) in _REBUILDERS:
            return _REBUILDERS[module, name]
        if module == "argparse" and name == "Namespace":
            return argparse.Namespace
        if module.split(".")[0] == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if module == "torch" and isinstance(found := vars(torch).get(name), _TORCH_VALUES):
            return found
        if module.split(".")[0] in _INERT_MODULES or (module, name) in _INERT_NAMES:
            return Inert
        raise RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to something that is not a storage")
        _, dtype, key, _, numel = pid[:5]
        if not isinstance(dtype, torch.dtype) or not isinstance(key, (str, int)):
            raise pickle.UnpicklingError("a storage has no dtype or no name")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("it has storages that are views of others, which only PyTorch 0.3 wrote")
        storage = Storage(str(key), dtype, _whole(numel))
        if self.storages.setdefault(storage.key, storage) != storage:
            raise pickle.UnpicklingError("it describes one storage in two ways")
        return storage

    def load_frame(self) -> None:
        self.read(8)  # a hint for buffering

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not (_is_class(function) or _is_rebuilder(function)):
            raise pickle.UnpicklingError("it calls something that is not a class")
        self.stack[-1] = function(*arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack[-1]
        if not _is_class(kind):
            raise pickle.UnpicklingError("it creates an object from something that is not a class")
        self.stack[-1] = kind.__new__(kind, *arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is argparse.Namespace and isinstance(state, dict):
            vars(self.stack[-1]).update({name: value for name, value in state.items() if isinstance(name, str)})

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        if not isinstance(self.stack[-1], (dict, Inert)):
            raise pickle.UnpicklingError("it sets an item of something that is not a dictionary")
        if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
            raise pickle.UnpicklingError("a dictionary has nested tuples as keys")  # hashing them may never end
        self.stack[-1][key] = value

    def load_additems(self) -> None:
        self.pop_mark()

    def load_empty_set(self) -> None:
        self.append(Inert())

    # The instructions that plain data and tensors need. Others could allocate without limit or import modules.
    dispatch = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in (
            *("PROTO", "STOP", "MARK", "POP", "POP_MARK", "DUP", "GLOBAL", "STACK_GLOBAL", "BINPERSID"),
            *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT"),
            *("BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
            *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2"),
            *("TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "GET", "BINGET", "LONG_BINGET"),
            *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
        )
    } | {
        pickle.FRAME[0]: load_frame,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
        pickle.EMPTY_SET[0]: load_empty_set,
    }


class _Bounded:
    """The stream of an unpickler, with limits on the numbers of bytes and reads."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._bytes, self._reads = MAX_PICKLE_BYTES, MAX_READS

    def read(self, size: int) -> bytes:
        self._count(size)
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError("it ends too early")
        return data

    def readline(self) -> bytes:
        line = self._stream.readline(min(self._bytes, 2**16))
        self._count(len(line))
        return line

    def _count(self, size: int) -> None:
        self._bytes -= size
        self._reads -= 1
        if size < 0 or self._bytes < 0 or self._reads < 0:
            raise pickle.UnpicklingError("it is larger than that of any checkpoint")


def _is_class(value: Any) -> bool:
    return value is argparse.Namespace or value is Inert


def _is_rebuilder(value: Any) -> bool:
    return any(value is function for function in _REBUILDERS.values())


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise pickle.UnpicklingError("a size of a tensor is not a whole number")
    return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any, metadata: Any) -> StoredTensor | OtherTensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor has no storage or no dtype")
    if storage.dtype in _QUANTISED:
        return OtherTensor("quantised")
    size, stride = (tuple(_whole(number) for number in numbers) for numbers in (size, stride))
    if len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor has different numbers of strides and sizes")
    negated = isinstance(metadata, dict) and bool(metadata.get("neg"))
    return StoredTensor(storage, dtype, _whole(offset), size, stride, negated)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any) -> StoredTensor | OtherTensor:
    return _rebuild_tensor_v2(storage, offset, size, stride)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> StoredTensor | OtherTensor:
    return _tensor(storage, offset, size, stride, getattr(storage, "dtype", None), metadata)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> StoredTensor | OtherTensor:
    return _tensor(storage, offset, size, stride, dtype, metadata)


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any = None) -> Any:
    """A tensor with extra attributes, or of a subclass."""
    if kind is not _plain_tensor:
        return OtherTensor("subclassed")
    if not _is_rebuilder(function):
        raise pickle.UnpicklingError("a tensor is not made by a function for tensors")
    return function(*arguments)


def _first(data: Any, *_: Any) -> Any:
    return data


def _plain_tensor(*_: Any) -> OtherTensor:
    """Replaces the classes `torch.Tensor` and `torch.nn.Parameter`."""
    return OtherTensor("unknown")


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    if items:
        raise pickle.UnpicklingError("a dictionary is made of pairs, as only Python 2 did")
    return {}


def _other(kind: str) -> Callable[..., OtherTensor]:
    return lambda *_: OtherTensor(kind)


_REBUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Tensor"): _plain_tensor,
    ("torch.nn.parameter", "Parameter"): _plain_tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    **{
        ("torch._utils", name): function
        for name, function in {
            "_rebuild_tensor": _rebuild_tensor,
            "_rebuild_tensor_v2": _rebuild_tensor_v2,
            "_rebuild_tensor_v3": _rebuild_tensor_v3,
            "_rebuild_parameter": _first,
            "_rebuild_parameter_with_state": _first,
            "_rebuild_device_tensor_from_cpu_tensor": _first,
            "_rebuild_sparse_tensor": _other("sparse"),
            "_rebuild_qtensor": _other("quantised"),
            "_rebuild_meta_tensor_no_storage": _other("meta"),
            "_rebuild_nested_tensor": _other("nested"),
            "_rebuild_wrapper_subclass": _other("subclassed"),
        }.items()
    },
    ("torch.nested._internal.nested_tensor", "_rebuild_njt"): _other("nested"),
}
