"""Writes checkpoints as directories: config.json, model.safetensors with what the tasks use, and maybe a vocabulary."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mplug2_fast.checkpoint.card import CARD_NAME, model_card
from mplug2_fast.checkpoint.eight_bit import OTHERS, QUANTISATION_KEY, rounding, to_json
from mplug2_fast.checkpoint.load import OfficialModel, check_finite, fitted
from mplug2_fast.checkpoint.pages import PageReleaser
from mplug2_fast.checkpoint.pretrained import read
from mplug2_fast.checkpoint.resolve import Tasks, require_twins, resolve
from mplug2_fast.checkpoint.source import (
    CONFIG_NAME,
    METADATA_KEY,
    VOCABULARY_NAME,
    WEIGHTS_NAME,
    open_checkpoint,
    vocabulary_path,
)
from mplug2_fast.devices import pick_dtype
from mplug2_fast.errors import CheckpointError
from mplug2_fast.models import official_names
from mplug2_fast.models.eight_bit import FORMATS, Quantisation
from mplug2_fast.models.names import Shape
from mplug2_fast.tasks import Task, get, stated, title_of

_SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_EIGHT_BIT_DTYPES = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}


def convert(
    src: str | Path,
    dst: str | Path,
    task: Tasks = None,
    dtype: torch.dtype | str | None = None,
    config: Any = None,
    keep: Sequence[str] = (),
) -> Path:
    """Converts a checkpoint of any format to a directory. Only one tensor is in memory at a time.

    Args:
        src: as `from_pretrained` takes it.
        dst: a directory that does not exist yet or is empty. It is written atomically.
        task: the task or tasks to keep. None: as in `from_pretrained`.
        dtype: None keeps the dtype of each tensor. "int8", "fp8": linear layers get 8-bit weights, with a float32 scale
            for each output; other weights are bfloat16. The rounded model is then in memory.
        config: overrides what the file says and what its shapes imply.
        keep: with 8-bit weights, patterns of layers that are not rounded: see `Model.quantise`.

    Returns `dst`. Raises `CheckpointError` as `from_pretrained` does, and if `dst` is not empty.
    """
    _require_free(Path(dst).expanduser())
    source = open_checkpoint(src)
    quantisation = rounding(source.name, source.quantisation, dtype, keep)
    if quantisation is not None and source.quantisation is None:
        model = read(source, task, config, OTHERS, torch.device("cpu"), quantisation=quantisation)
        return _save(model, dst, list(model.tasks.values()), vocabulary_path(src))
    if quantisation is not None or dtype == "auto":
        dtype = None
    elif isinstance(dtype, str):
        dtype = pick_dtype(dtype, torch.device("cpu"))
    resolved = resolve(source, task, config)
    resolved.require(source)
    release = PageReleaser(source.file)
    require_twins(source, resolved, release)
    wanted = resolved.names.needed
    described = {key: (dtype or source.tensors[key].dtype, shape) for key, shape in wanted.items()}

    def tensors() -> Iterator[torch.Tensor]:
        for key, (kind, shape) in _file_order(described).items():
            try:
                check_finite(key, source.tensors[key], kind)
            except CheckpointError as error:
                raise CheckpointError(f"{source.name}: {error}") from error
            yield fitted(source.tensors[key], shape).to(kind)
            release(source.tensors[key])

    content = described, tensors()
    return _write(dst, resolved.config, resolved.tasks, *content, vocabulary_path(src), quantisation=quantisation)


def save_pretrained(
    model: OfficialModel,
    directory: str | Path,
    dtype: torch.dtype | None = None,
    vocab: str | Path | None = None,
    task: Tasks = None,
    card: str = "",
) -> Path:
    """Writes a fast or a reference model as a directory.

    Args:
        model: the model.
        directory: like `dst` of `convert`.
        dtype: None keeps the dtype of each parameter. Models with 8-bit weights keep it anyway.
        vocab: a WordPiece vocabulary to copy into the directory. None: BERT's, without a copy.
        task: the task or tasks to keep, such as captioning of a question answering model. None: all tasks.
        card: Markdown to add to the model card, README.md.

    Returns the directory. Raises `CheckpointError` if the directory is not empty, if the model lacks modules of a task,
    if a weight is not finite or would not be in `dtype`, and for another `dtype` than that of 8-bit weights.
    """
    given = [task] if isinstance(task, (str, Task)) else list(task or model.tasks.values())
    tasks = [model.tasks.get(each, each) if isinstance(each, str) else each for each in given]
    return _save(model, directory, [get(each) for each in tasks], None if vocab is None else Path(vocab), dtype, card)


def _save(
    model: OfficialModel,
    directory: str | Path,
    tasks: Sequence[Task],
    vocabulary: Path | None,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> Path:
    quantisation = getattr(model, "quantisation", None)
    if quantisation is not None and dtype is not None:
        raise CheckpointError(f"the weights are rounded to 8 bits and cannot be saved as {dtype}: leave dtype out")
    views = model.official_parameters()
    wanted = official_names(model.config, tasks, quantisation).needed
    missing = wanted.keys() - views.keys()
    if missing:
        raise CheckpointError(
            f"a {title_of(model.tasks.values())} model lacks {len(missing)} entries that {title_of(tasks)} needs, such "
            f"as {min(missing)}; save it for its own tasks"
        )
    described = {key: (dtype or views[key].dtype, shape) for key, shape in wanted.items()}

    def tensors() -> Iterator[torch.Tensor]:
        for key, (kind, _) in _file_order(described).items():
            check_finite(key, views[key], kind)
            yield views[key].to("cpu", kind)

    return _write(directory, model.config, tasks, described, tensors(), vocabulary, card, quantisation)


def _write(
    dst: str | Path,
    config: Any,
    tasks: Sequence[Task],
    described: Mapping[str, tuple[torch.dtype, Shape]],
    tensors: Iterator[torch.Tensor],
    vocabulary: Path | None,
    card: str | None = None,
    quantisation: Quantisation | None = None,
) -> Path:
    values = {"family": config.family, "tasks": [stated(task) for task in tasks], **config.to_dict()}
    if quantisation is not None:
        values[QUANTISATION_KEY] = to_json(quantisation)
    with _appearing(Path(dst).expanduser()) as folder:
        (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        metadata = {"format": "pt", METADATA_KEY: json.dumps(values)}
        numbers = None if quantisation is None else FORMATS[quantisation.weights].dtype
        _write_safetensors(folder / WEIGHTS_NAME, described, tensors, metadata, numbers)
        if card is not None:
            (folder / CARD_NAME).write_text(model_card(config, tasks, card), encoding="utf-8")
        if vocabulary is not None:
            shutil.copyfile(vocabulary, folder / VOCABULARY_NAME)
    return Path(dst).expanduser()


def _write_safetensors(
    file: Path,
    described: Mapping[str, tuple[torch.dtype, Shape]],
    tensors: Iterator[torch.Tensor],
    metadata: Mapping[str, str],
    numbers: torch.dtype | None,
) -> None:
    """Writes a safetensors file tensor by tensor. The library's writer needs all cast tensors in memory.

    `numbers`: the dtype of 8-bit weights, if there are any.
    """
    names = _SAFETENSORS_DTYPES | {dtype: name for dtype, name in _EIGHT_BIT_DTYPES.items() if dtype == numbers}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, (dtype, shape) in _file_order(described).items():
        if dtype not in names:
            raise CheckpointError(f"cannot store weights as {dtype}: choose float32, bfloat16 or float16")
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _file_order(described: Mapping[str, tuple[torch.dtype, Shape]]) -> dict[str, tuple[torch.dtype, Shape]]:
    """Sorts by dtype, widest first, so that every tensor is aligned; then by name."""
    return dict(sorted(described.items(), key=lambda item: (-item[1][0].itemsize, item[0])))


def _require_free(dst: Path) -> None:
    try:
        exists, is_folder = dst.exists(), dst.is_dir()
        is_full = is_folder and any(dst.iterdir())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{dst}: the checkpoint cannot be written: {reason}") from error
    if is_full:
        raise CheckpointError(f"{dst}: the directory is not empty; choose a new one")
    if exists and not is_folder:
        raise CheckpointError(f"{dst}: a file has that name; choose a new directory")


@contextmanager
def _appearing(dst: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `dst` if the block succeeds and removed if it fails."""
    _require_free(dst)
    outer = None
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        outer = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
        folder = outer / dst.name
        folder.mkdir()  # with default permissions, unlike mkdtemp's
        yield folder
        if dst.is_dir():
            dst.rmdir()
        os.replace(folder, dst)
    except OSError as error:
        raise CheckpointError(f"{dst}: the checkpoint cannot be written: {error.strerror or error}") from error
    finally:
        if outer is not None:
            shutil.rmtree(outer, ignore_errors=True)
