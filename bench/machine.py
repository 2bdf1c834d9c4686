"""The machine and the versions of a result."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mplug2_fast import info

# From glibc's <malloc.h>.
_MALLOPT_TRIM_THRESHOLD, _MALLOPT_MMAP_MAX = -1, -4


def describe() -> tuple[dict[str, Any], dict[str, Any]]:
    """(machine, versions), without any path or user name."""
    report = info.collect()
    cpu, gpus = report["cpu"], report["cuda"]["devices"]
    machine = {
        "cpu": cpu["model"],
        "cores": cpu["usable_cores"],
        "simd": cpu["simd"],
        "memory_bytes": report["memory"]["total"],
        "os": report["system"],
        "gpu": gpus[0]["name"] if gpus else None,
    }
    versions = {
        "torch": report["torch"]["version"],
        "python": report["python"]["version"],
        "mplug2_fast": report["mplug2_fast"]["version"],
        "native": report["native"]["available"],
        "commit": commit(),
    }
    return machine, versions


def words(machine: Mapping[str, Any], versions: Mapping[str, Any]) -> str:
    """The measured device and its PyTorch: "AMD EPYC, 2 threads · torch 2.13.0+cpu"."""
    where = machine.get("gpu")
    if where is None or not str(machine.get("device", "cuda")).startswith("cuda"):
        count = machine.get("threads") or machine["cores"]
        where = f"{machine['cpu']}, {count} thread{'s' if count > 1 else ''}"
    return f"{where} · torch {versions['torch']}"


def commit() -> str | None:
    """The commit of this checkout, followed by "+" if files differ. Outside a checkout MPLUG2_FAST_COMMIT, or None."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MPLUG2_FAST_COMMIT")
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory. By default it returns large blocks, and the system clears their pages again. That
    takes half of the time of a small operator, and depends on what ran before."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MALLOPT_MMAP_MAX, 0)
        mallopt(_MALLOPT_TRIM_THRESHOLD, 2**31 - 1)
