"""Which configuration of a kernel is best on a device: tried once, kept in a file of that device, read from then on.

The files lie in `$MPLUG2_FAST_TUNING`, or in `mplug2_fast/tuning` below the user's cache folder: one a device, JSON,
made to be read and edited. `MPLUG2_FAST_TUNING=off` tries nothing and takes each kernel's first configuration.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

VARIABLE = "MPLUG2_FAST_TUNING"
OFF = "off"


@dataclass(frozen=True)
class Config:
    """Constants of a kernel that change how fast it is and not what it computes."""

    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def __str__(self) -> str:
        named = [f"{name}={value}" for name, value in self.constants.items()]
        return ", ".join([*named, f"warps={self.num_warps}", f"stages={self.num_stages}"])


def folder() -> Path | None:
    """Where the files lie; None where nothing is tuned."""
    found = os.environ.get(VARIABLE, "")
    if found == OFF:
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(found) if found else Path(cache) / "mplug2_fast" / "tuning"


def best(
    kernel: Any,
    configs: Sequence[Config],
    device: torch.device,
    key: tuple[Any, ...],
    launch: Callable[[Config], None],
) -> Config:
    """The configuration for this key: the file's, or the fastest of all, which is then written to it.

    Nothing is tried while a CUDA graph is captured: the first configuration serves then.
    """
    where = folder()
    if where is None:
        return configs[0]
    table = _table(where / f"{_device_name(device)}.json")
    entry = f"{kernel.name} {_source(kernel.function)} {' '.join(map(str, key))}"
    if (known := table.get(entry)) is not None:
        return known
    if torch.cuda.is_current_stream_capturing():
        return configs[0]
    times = {}
    for config in configs:
        try:
            times[config_key(config)] = triton.testing.do_bench(lambda c=config: launch(c), warmup=5, rep=20), config
        except triton.runtime.errors.OutOfResources:  # more shared memory or registers than this GPU has
            continue
    if not times:
        raise RuntimeError(
            f"none of the {len(configs)} configurations of {kernel.name} fits {torch.cuda.get_device_name(device)}: "
            "use_backend('torch') computes without it"
        )
    milliseconds, chosen = min(times.values(), key=lambda pair: pair[0])
    table.put(entry, chosen, milliseconds)
    return chosen


def config_key(config: Config) -> str:
    return json.dumps(asdict(config), sort_keys=True)


class Table:
    """Entries of one device's file, of all processes' that share it."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self._entries = self._read()

    def get(self, entry: str) -> Config | None:
        found = self._entries.get(entry)
        return None if found is None else Config(found["constants"], found["num_warps"], found["num_stages"])

    def put(self, entry: str, config: Config, milliseconds: float) -> None:
        with self._lock:
            self._entries = {**self._read(), entry: {**asdict(config), "milliseconds": round(milliseconds, 5)}}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".part", delete=False) as file:
                json.dump(self._entries, file, indent=1, sort_keys=True)
            os.replace(file.name, self.path)  # other processes see the old file or the new one

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            return json.loads(self.path.read_text())
        except ValueError as error:
            raise ValueError(f"{self.path} is not what tuning wrote ({error}): correct it or delete it") from error


_table = functools.cache(Table)


@functools.cache
def _device_name(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}".replace("/", "-")


@functools.cache
def _source(function: Any) -> str:
    """A hash of the kernel's text and of all that it calls: another text may have another best configuration."""
    return function.cache_key[:12]
