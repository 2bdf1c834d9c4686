"""Opens a checkpoint of any format without reading its weights, which are memory-mapped."""

from __future__ import annotations

import argparse
import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mplug2_fast.checkpoint.eight_bit import QUANTISATION_KEY, from_json
from mplug2_fast.checkpoint.hub import local
from mplug2_fast.checkpoint.load import plain_state_dict
from mplug2_fast.checkpoint.pickles import Inert, OtherTensor, RefusedError, StoredTensor
from mplug2_fast.checkpoint.torch_file import BROKEN, LEGACY_MAGIC, TorchFile, open_torch_file, tensor_of
from mplug2_fast.errors import CheckpointError, ConfigError, printable
from mplug2_fast.models import FAMILIES
from mplug2_fast.models.eight_bit import Quantisation
from mplug2_fast.tasks import Stated

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
VOCABULARY_NAME = "vocab.txt"
DEEPSPEED_NAME = "mp_rank_00_model_states.pt"
"""The file with the weights in a folder that DeepSpeed writes."""
METADATA_KEY = "mplug2_config"
"""Entry of the safetensors header that repeats config.json, so that the weights file is sufficient."""

ENTRIES = ("model", "module", "state_dict")
"""Entries of a training checkpoint that hold the weights. The first existing one is read, and never an EMA copy."""

_MAX_CONFIG_BYTES = 2**20
_MAX_HEADER_BYTES = 16 * 2**20
_MAX_SHARING = 4
"""Maximum ratio of the sizes of all tensors and of their storages. Tied weights and copies share storages."""


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        path: the caller's path.
        file: the file with the weights.
        container: the format, in words.
        tensors: official key -> tensor, without prefixes of wrappers; views of the mapped file.
        config: the configuration, if the file has a complete one.
        tasks: the tasks that the file names.
        quantisation: of 8-bit weights, if linear layers have them. Otherwise None.
        stated: the `config` entry of a training checkpoint.
        entry: the top-level entry with the weights, or None for a bare state dict.
        others: other top-level entries, such as optimizer state.
    """

    path: Path
    file: Path
    container: str
    tensors: dict[str, torch.Tensor]
    config: Any = None
    tasks: tuple[Stated, ...] = ()
    quantisation: Quantisation | None = None
    stated: Mapping[str, Any] = field(default_factory=dict)
    entry: str | None = None
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The path, for messages."""
        return shown_path(self.path)


def shown_path(path: str | Path) -> str:
    """A path for messages, on one line."""
    return printable(str(path), longest=4096)


def open_checkpoint(path: str | Path) -> Source:
    """Opens an official `.pth`, a directory with config.json and model.safetensors, a `.safetensors`, or `owner/name`.

    The last is a directory on the Hugging Face Hub, and is downloaded. A folder that DeepSpeed wrote works too. No code
    in the file is executed. Raises `CheckpointError` with the file, the reason and the remedy.
    """
    path = local(path)
    shown = shown_path(path)
    try:
        path = path.expanduser()
        path = _deepspeed_weights(path) or path
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            return _open_directory(path)
        _require_regular(path, kind)
        with path.open("rb") as stream:
            head = stream.read(512)
    except FileNotFoundError as error:
        raise CheckpointError(f"{shown}: no such file or directory; check the path") from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{shown}: cannot be read: {reason}; check the path and its permissions") from error
    try:
        if path.suffix == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32):
            return _open_safetensors(path, head)
        if head.startswith(b"PK"):
            return _open_torch(path, head, "torch.save file")
        if head.startswith(LEGACY_MAGIC):
            return _open_torch(path, head, "torch.save file, pre-1.6 format")
        raise CheckpointError(_what_else(head))
    except CheckpointError as error:
        raise CheckpointError(f"{shown}: {error}") from error


def _deepspeed_weights(folder: Path) -> Path | None:
    """The file with the weights in a folder that DeepSpeed wrote, or in the folder that its file `latest` names.

    Raises `CheckpointError` if they are split over several files.
    """
    if not folder.is_dir() or (folder / CONFIG_NAME).exists():
        return None
    latest = folder / "latest"
    if latest.is_file():
        with latest.open("rb") as stream:
            name = os.fsdecode(stream.read(256)).strip()
        if name and Path(name).name == name:
            folder = folder / name
    file = folder / DEEPSPEED_NAME
    if not file.is_file():
        return None
    parts = len(list(folder.glob("mp_rank_*_model_states.pt")))
    if parts > 1:
        raise CheckpointError(
            f"{shown_path(folder)}: the weights are split over {parts} files; merge them with DeepSpeed's "
            "zero_to_fp32.py"
        )
    return file


def vocabulary_path(path: str | Path) -> Path | None:
    """The WordPiece vocabulary in a checkpoint directory, or None, which means BERT's."""
    path = local(path).expanduser()
    vocabulary = path / VOCABULARY_NAME
    return vocabulary if path.is_dir() and vocabulary.is_file() else None


def _require_regular(path: Path, mode: int) -> None:
    """Raises `CheckpointError` for anything but a regular file: reading it may never end."""
    kinds = {
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    if not stat.S_ISREG(mode):
        kind = kinds.get(stat.S_IFMT(mode), "a special file")
        raise CheckpointError(f"{shown_path(path)}: {kind}, not a file; name a file or a directory")


def _open_directory(path: Path) -> Source:
    shown = shown_path(path)
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (path / name).exists()]
    if missing:
        found = ", ".join(printable(name) for name in sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise CheckpointError(
            f"{shown}: a checkpoint directory has {CONFIG_NAME} and {WEIGHTS_NAME}, this one lacks "
            f"{' and '.join(missing)} (it has {found}); name the checkpoint file itself, or convert it to a directory"
        )
    file, weights = path / CONFIG_NAME, path / WEIGHTS_NAME
    for name in (file, weights):
        _require_regular(name, name.stat().st_mode)
    with file.open("rb") as stream:
        text = stream.read(_MAX_CONFIG_BYTES + 1)
    with weights.open("rb") as stream:
        head = stream.read(512)
    try:
        stated = _stated_config(text)
    except CheckpointError as error:
        raise CheckpointError(f"{shown_path(file)}: {error}; restore it, or convert again") from error
    try:
        source = _open_safetensors(weights, head)
    except CheckpointError as error:
        raise CheckpointError(f"{shown_path(weights)}: {error}") from error
    return Source(path, weights, f"directory with {CONFIG_NAME} and {WEIGHTS_NAME}", source.tensors, *stated)


def _open_safetensors(path: Path, head: bytes) -> Source:
    from safetensors import SafetensorError, safe_open

    if not head:
        raise CheckpointError("the file is empty; download or convert it again")
    if head[8:9] != b"{":
        raise CheckpointError(f"not a readable safetensors file: {_what_else(head)}")
    header = int.from_bytes(head[:8], "little")
    if _MAX_HEADER_BYTES < header <= path.stat().st_size:
        raise CheckpointError(f"its header has {header:,} bytes, more than that of any checkpoint; convert it again")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, struct.error) as error:
        reason = printable(str(error))
        raise CheckpointError(
            f"not a readable safetensors file: truncated or corrupt ({reason}); download or convert it again"
        ) from error
    stated: tuple[Any, ...] = ()
    if METADATA_KEY in metadata:
        try:
            stated = _stated_config(metadata[METADATA_KEY].encode("utf-8", "surrogatepass"))
        except CheckpointError as error:
            raise CheckpointError(f"its header's {METADATA_KEY}: {error}; convert again") from error
    return Source(path, path, "safetensors file", plain_state_dict(tensors), *stated)


def _stated_config(text: bytes) -> tuple[Any, tuple[Stated, ...], Quantisation | None]:
    """The configuration, the tasks, and what a JSON text says of 8-bit weights."""
    if len(text) > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"not a configuration: it has more than {_MAX_CONFIG_BYTES:,} bytes")
    try:
        stated = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else printable(str(error))
        raise CheckpointError(f"not readable as JSON ({reason})") from error
    if not isinstance(stated, dict):
        raise CheckpointError(f"holds no configuration but {type(stated).__name__}")
    task, tasks = stated.pop("task", None), stated.pop("tasks", None)
    tasks = tasks if tasks is not None else [] if task is None else [task]
    if not isinstance(tasks, list) or not all(isinstance(each, (str, dict)) for each in tasks):
        raise CheckpointError(f"its tasks are {printable(repr(tasks))}, not a list of names")
    quantisation = stated.pop(QUANTISATION_KEY, None)
    quantisation = None if quantisation is None else from_json(quantisation)
    family = stated.pop("family", next(iter(FAMILIES)))
    if family not in FAMILIES:
        raise CheckpointError(f"its family {printable(repr(family))} is not one of {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family].config.from_dict(stated), tuple(tasks), quantisation
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _open_torch(path: Path, head: bytes, container: str) -> Source:
    try:
        file = open_torch_file(path, head)
        return _torch_source(path, file, container)
    except RefusedError as error:
        raise CheckpointError(
            f"refused: its pickle holds {printable(str(error))}, and reading that would run code; if you trust its "
            "origin, save its 'model' entry alone in an isolated environment and use that file"
        ) from error
    except BROKEN as error:
        reason = printable(" ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]]).rstrip(":"))
        raise CheckpointError(f"not a readable torch.save file ({reason}); download it again") from error


def _torch_source(path: Path, file: TorchFile, container: str) -> Source:
    loaded = file.content
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"holds no state dict but {_kind(loaded)}; use an official checkpoint")
    name = next((name for name in ENTRIES if isinstance(loaded.get(name), Mapping)), None)
    weights = loaded if name is None else loaded[name]
    if not any(isinstance(value, (StoredTensor, OtherTensor)) for value in weights.values()):
        listing = ", ".join(printable(str(key)) for key in list(weights)[:5]) or "nothing"
        where = "" if name is None else f" in its {name!r} entry"
        raise CheckpointError(
            f"holds no weights{where}, only {listing}; an official checkpoint has them under 'model' or 'module'"
        )
    for key, value in weights.items():
        if isinstance(value, OtherTensor):
            raise CheckpointError(
                f"{printable(str(key))} is a {value.kind} tensor, and weights are dense; save it as a dense one"
            )
    foreign = [(key, value) for key, value in weights.items() if not isinstance(value, StoredTensor)]
    if foreign:
        key, kind = printable(str(foreign[0][0])), _kind(foreign[0][1])
        raise CheckpointError(
            f"{len(foreign)} entries of the state dict are no tensors, such as {key} ({kind}); "
            "save the state dict alone, or under 'model'"
        )
    tensors = {key: tensor_of(file, value) for key, value in weights.items()}
    _require_own_memory(tensors)
    stated = {} if name is None else loaded.get("config")
    stated = vars(stated) if isinstance(stated, argparse.Namespace) else stated
    return Source(
        path,
        path,
        container,
        plain_state_dict(tensors),
        stated=stated if isinstance(stated, Mapping) else {},
        entry=name,
        others=() if name is None else tuple(printable(str(key)) for key in loaded if key != name),
    )


def _require_own_memory(tensors: Mapping[Any, torch.Tensor]) -> None:
    """Raises `CheckpointError` if tensors repeat a few numbers: a small file could otherwise build a huge model."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    stated, stored = sum(tensor.nbytes for tensor in tensors.values()), sum(storages.values())
    if stated > _MAX_SHARING * stored + _MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"its tensors need {stated:,} bytes, and the file has only {stored:,} for them: they repeat numbers; "
            "save it with every tensor cloned"
        )


def _kind(value: Any) -> str:
    return "an object" if isinstance(value, Inert) else type(value).__name__


def _what_else(head: bytes) -> str:
    """Says what a file is that is not a checkpoint, from its first bytes."""
    text = head.lstrip().lower()
    if not head:
        return "the file is empty; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not a checkpoint: the download was redirected; download it again"
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "a plain pickle, which could run code; save the weights with torch.save or safetensors"
    if head[:2] == b"\x1f\x8b":
        return "a gzip archive; unpack it first"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "a text file, not a checkpoint; use a .pth, a .safetensors or a checkpoint directory"
    return "not a checkpoint; use a .pth, a .safetensors or a checkpoint directory"
