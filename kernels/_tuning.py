"""Finds the fastest configuration of a kernel on a device, and whether PyTorch is faster still.

Each case is timed once, and the result is kept in a file. Only the time on the device counts, because in a CUDA graph
the host costs nothing. The files are in `$MPLUG2_FAST_TUNING`, or in `mplug2_fast/tuning` in the user's cache folder:
one JSON file per device, meant to be read and edited. `MPLUG2_FAST_TUNING=off` times nothing and takes each kernel's
first configuration.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import tempfile
import threading
import time
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
    """Constants of a kernel that change its speed but not its results."""

    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def __str__(self) -> str:
        named = [f"{name}={value}" for name, value in self.constants.items()]
        return ", ".join([*named, f"warps={self.num_warps}", f"stages={self.num_stages}"])


def setting() -> str:
    return os.environ.get(VARIABLE, "")


def folder() -> Path | None:
    """The folder of the files. None if tuning is off."""
    found = setting()
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
    """The configuration for this key from the file; otherwise the fastest, which is added to the file.

    While a CUDA graph is captured, nothing is timed, and a key that is not in the file gets the first configuration.
    """
    table = _table(device)
    if table is None:
        return configs[0]
    entry = _entry(kernel.name, (kernel.function,), key)
    if (known := table.get(entry, "constants", "num_warps", "num_stages")) is not None:
        return Config(*known)
    if torch.cuda.is_current_stream_capturing():
        return configs[0]
    times = []
    for config in configs:
        try:
            times.append((device_milliseconds(functools.partial(launch, config), device), config))
        except triton.runtime.errors.OutOfResources:  # more shared memory or registers than this GPU has
            continue
    if not times:
        raise RuntimeError(
            f"none of the {len(configs)} configurations of {kernel.name} fits {torch.cuda.get_device_name(device)}: "
            "use_backend('torch') computes without it"
        )
    milliseconds, chosen = min(times, key=lambda pair: pair[0])
    table.put(entry, {**asdict(chosen), "milliseconds": round(milliseconds, 5)})
    return chosen


class Race:
    """Times an operator's kernels against PyTorch's own operators, where those are fast.

    Args:
        name: the operator's.
        functions: the kernels, each decorated with `triton.jit`.
    """

    def __init__(self, name: str, *functions: Any) -> None:
        self.name, self.functions = name, functions

    def run(
        self, device: torch.device, key: tuple[Any, ...], ours: Callable[[], Any], torchs: Callable[[], Any]
    ) -> None:
        """Times both and stores the times, once per key. Does nothing while a CUDA graph is captured."""
        table = _table(device)
        if table is None or table.get(self._entry(key)) is not None or torch.cuda.is_current_stream_capturing():
            return
        times = {name: device_milliseconds(way, device) for name, way in (("triton", ours), ("torch", torchs))}
        table.put(self._entry(key), {f"{name}_milliseconds": round(time, 5) for name, time in times.items()})

    def lost(self, device: torch.device, key: tuple[Any, ...]) -> str | None:
        """A message that PyTorch was faster, with both times. None if it was not, or if nothing was timed."""
        table = _table(device)
        known = None if table is None else table.get(self._entry(key), "triton_milliseconds", "torch_milliseconds")
        if known is None or known[0] <= known[1]:
            return None
        ours, torchs = known
        return f"tuning found PyTorch's own operators faster at about these sizes: {torchs:g} ms against {ours:g}"

    def _entry(self, key: tuple[Any, ...]) -> str:
        return _entry(f"{self.name} against PyTorch", self.functions, key)


class Table:
    """The entries of one device's file, which several processes may share."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self._entries = self._read()

    def get(self, entry: str, *fields: str) -> tuple[Any, ...] | None:
        """The entry's fields. None if there is no such entry."""
        found = self._entries.get(entry)
        if found is None:
            return None
        try:
            return tuple(found[name] for name in fields)
        except (KeyError, TypeError) as error:
            raise self._error(f"{entry!r} has no {error}") from error

    def put(self, entry: str, fields: Mapping[str, Any]) -> None:
        with self._lock:
            self._entries = {**self._read(), entry: fields}
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
            raise self._error(str(error)) from error

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is not what tuning wrote ({what}): correct it or delete it")


def device_milliseconds(way: Callable[[], Any], device: torch.device) -> float:
    """Median time on the device, with a cold L2 cache.

    The device sleeps until all work is queued, so that it never waits for the host.
    """
    with torch.cuda.device(device):
        way()  # compiles
        torch.cuda.synchronize()
        began = time.perf_counter()
        way()
        host = time.perf_counter() - began
        torch.cuda.synchronize()
        whole = time.perf_counter() - began
        repeats = min(max(int(_SECONDS / whole), 3), 20)
        cache = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
        for ahead in (2, 8, 32):
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
            torch.cuda._sleep(int(ahead * (host + _QUEUING) * repeats * _CYCLES))
            for start, end in events:
                cache.zero_()
                start.record()
                way()
                end.record()
            slept = not events[0][0].query()
            torch.cuda.synchronize()
            if slept:
                break
        return statistics.median(start.elapsed_time(end) for start, end in events)


_SECONDS = 0.03
"""Time spent on one of the candidates."""
_QUEUING = 50e-6
"""Host seconds per call, besides the call itself."""
_CYCLES = 2e9
"""Device cycles per second."""


_open = functools.cache(Table)


@functools.cache
def _device_table(setting: str, device: torch.device) -> Table | None:
    where = folder()
    return None if where is None or device.type != "cuda" else _open(where / f"{_device_name(device)}.json")


def _table(device: torch.device) -> Table | None:
    """The device's table. None if tuning is off."""
    return _device_table(setting(), device)


@functools.lru_cache(4096)
def _entry(name: str, functions: Sequence[Any], key: tuple[Any, ...]) -> str:
    """The key in the file. It has a hash of each kernel, because a changed kernel may need another configuration."""
    return " ".join([name, *map(_source, functions), *map(str, key)])


@functools.cache
def _device_name(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}".replace("/", "-")


@functools.cache
def _source(function: Any) -> str:
    """A hash of a kernel's source and of all functions that it calls."""
    return function.cache_key[:12]
