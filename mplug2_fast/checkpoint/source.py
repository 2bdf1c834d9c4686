"""Open a checkpoint of any form without reading its weights: what it holds, memory-mapped, or one clear error."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mplug2_fast.checkpoint.load import strip_prefixes
from mplug2_fast.config import TASKS, MPlug2Config, Task
from mplug2_fast.errors import CheckpointError, ConfigError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
VOCABULARY_NAME = "vocab.txt"
METADATA_KEY = "mplug2_config"
"""Entry of a safetensors header that repeats config.json, so that the weights alone are enough."""

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# What reading a damaged pickle or archive was seen to raise.
_BROKEN = (
    *(RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(ArithmeticError, MemoryError, struct.error, zipfile.BadZipFile),
)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        path: what the caller named.
        file: the file with the weights.
        container: the form, in words.
        tensors: released key -> tensor, `module.` prefixes gone, views of the mapped file.
        config: the configuration, where the file states it in full.
        task: the task that the file says it is for.
        released: the `config` entry of a training checkpoint.
        others: top-level entries beside the weights, such as optimizer state.
    """

    path: Path
    file: Path
    container: str
    tensors: dict[str, torch.Tensor]
    config: MPlug2Config | None = None
    task: Task | None = None
    released: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()


def open_checkpoint(path: str | Path) -> Source:
    """Open a released `.pth`, a directory with config.json and model.safetensors, or a `.safetensors`.

    Nothing in the file is executed. Raises `CheckpointError`, naming the file, the reason and the remedy.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory; check the path")
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; make it readable") from error
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32):
        return _open_safetensors(path, head)
    if head.startswith(b"PK"):
        return _open_torch(path, "torch.save file")
    if head.startswith(_LEGACY_MAGIC):
        return _open_torch(path, "torch.save file, pre-1.6 format")
    raise CheckpointError(f"{path}: {_what_else(head)}")


def vocabulary_path(path: str | Path) -> Path | None:
    """The WordPiece vocabulary beside a checkpoint's weights; None where there is none, and BERT's serves."""
    path = Path(path).expanduser()
    vocabulary = path / VOCABULARY_NAME
    return vocabulary if path.is_dir() and vocabulary.is_file() else None


def _open_directory(path: Path) -> Source:
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (path / name).is_file()]
    if missing:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise CheckpointError(
            f"{path}: a checkpoint directory holds {CONFIG_NAME} and {WEIGHTS_NAME}, this one lacks "
            f"{' and '.join(missing)} (it has {found}); name the checkpoint file itself, or convert it to a directory"
        )
    file = path / CONFIG_NAME
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); restore it, or convert again") from error
    config, task = _stated_config(file, stated)
    weights = path / WEIGHTS_NAME
    with weights.open("rb") as stream:
        source = _open_safetensors(weights, stream.read(512))
    return Source(path, weights, f"directory with {CONFIG_NAME} and {WEIGHTS_NAME}", source.tensors, config, task)


def _open_safetensors(path: Path, head: bytes) -> Source:
    from safetensors import SafetensorError, safe_open

    if not head:
        raise CheckpointError(f"{path}: the file is empty; download or convert it again")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, RuntimeError, ValueError, struct.error) as error:
        reason = (
            _what_else(head) if head[8:9] != b"{" else f"truncated or corrupt ({error}); download or convert it again"
        )
        raise CheckpointError(f"{path}: not a readable safetensors file: {reason}") from error
    config = task = None
    if METADATA_KEY in metadata:
        try:
            stated = json.loads(metadata[METADATA_KEY])
        except ValueError as error:
            raise CheckpointError(f"{path}: its header's {METADATA_KEY} is no JSON ({error}); convert again") from error
        config, task = _stated_config(path, stated)
    return Source(path, path, "safetensors file", _prefixes_gone(path, tensors), config, task)


def _stated_config(file: Path, stated: Any) -> tuple[MPlug2Config, Task | None]:
    if not isinstance(stated, dict):
        raise CheckpointError(f"{file}: holds no configuration but {type(stated).__name__}; convert again")
    task = stated.pop("task", None)
    if task is not None and task not in TASKS:
        raise CheckpointError(f"{file}: its task {task!r} is not one of {', '.join(TASKS)}; correct it")
    try:
        return MPlug2Config.from_dict(stated), task
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: {error}; correct it, or convert again") from error


def _open_torch(path: Path, container: str) -> Source:
    zipped = "pre-1.6" not in container
    try:
        if zipped and not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path}: truncated: a torch.save file whose end is not there; download it again")
        # A namespace of plain values is how DeepSpeed stores its arguments; it cannot run anything.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_refused(str(error))}") from error
    except _BROKEN as error:
        reason = " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]]).rstrip(":")
        raise CheckpointError(f"{path}: not a readable torch.save file ({reason}); download it again") from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds no state dict but {type(loaded).__name__}; use a released checkpoint")
    name = next((name for name in ("model", "module") if isinstance(loaded.get(name), Mapping)), None)
    weights = loaded if name is None else loaded[name]
    if not any(isinstance(value, torch.Tensor) for value in weights.values()):
        listing = ", ".join(map(str, list(weights)[:5])) or "nothing"
        where = "" if name is None else f" in its {name!r} entry"
        raise CheckpointError(
            f"{path}: holds no weights{where}, only {listing}; a released checkpoint has them under 'model' or 'module'"
        )
    released = {} if name is None else loaded.get("config")
    released = vars(released) if isinstance(released, argparse.Namespace) else released
    return Source(
        path,
        path,
        container,
        _prefixes_gone(path, weights),
        released=released if isinstance(released, Mapping) else {},
        others=() if name is None else tuple(str(key) for key in loaded if key != name),
    )


def _prefixes_gone(path: Path, weights: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    try:
        tensors = strip_prefixes(weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    foreign = [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        kind = type(tensors[foreign[0]]).__name__
        raise CheckpointError(
            f"{path}: {len(foreign)} entries of the state dict are no tensors, first {foreign[0]} ({kind}); "
            "save the state dict alone, or under 'model'"
        )
    return tensors


def _refused(message: str) -> str:
    """Why the restricted unpickler stopped, from its message."""
    blocked = re.search(r"GLOBAL (\S+)", message)
    if not blocked:
        detail = re.search(r"WeightsUnpickler error: (.+)", message)
        return f"not a readable torch.save file ({detail[1] if detail else 'its pickle is broken'}); download it again"
    return (
        f"refused: its pickle holds {blocked[1]} beside tensors and plain values, and reading that would run code; "
        "if you trust its origin, save its 'model' entry alone in an isolated environment and use that file"
    )


def _what_else(head: bytes) -> str:
    """What a file that is no checkpoint is, from its first bytes."""
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
