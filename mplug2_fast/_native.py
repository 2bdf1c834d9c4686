"""The optional native module mplug2_fast._C. It is loaded at its first use."""

from __future__ import annotations

import functools
import importlib
import json
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_REMEDY = (
    "Install a C++17 compiler (g++ or clang++) and Python's headers (on Debian and Ubuntu: apt install g++ "
    "python3-dev), then install mplug2-fast again from its sources with MPLUG2_FAST_NATIVE=required, which stops "
    "with the full reason if the native module cannot be built."
)


@dataclass(frozen=True)
class NativeError:
    """Why mplug2_fast._C is missing."""

    reason: str
    """One sentence."""
    remedy: str
    """What to do about it."""
    traceback: str
    """Of the failed import; empty if there is no file to import."""

    def __str__(self) -> str:
        parts = [f"The native module mplug2_fast._C is not available: {self.reason}", self.remedy, self.traceback]
        return "\n".join(part for part in parts if part)


def native() -> ModuleType | None:
    """The native module, or None if it is missing. `native_error()` says why."""
    return _load()[0]


def native_error() -> NativeError | None:
    """Why the native module is missing; None if it is not."""
    return _load()[1]


@functools.cache
def warn_without_native() -> None:
    """Warns once per process that PyTorch replaces the missing native module."""
    if error := native_error():
        warnings.warn(
            f"mplug2_fast runs on its PyTorch fallbacks, because its native module is missing: {error.reason} "
            "See `mplug2-fast info` for the remedy.",
            RuntimeWarning,
            stacklevel=3,
        )


@functools.cache
def _load() -> tuple[ModuleType | None, NativeError | None]:
    folder = Path(__file__).parent
    try:
        return importlib.import_module("mplug2_fast._C"), None
    except ImportError as error:
        trace = traceback.format_exc()
        built = sorted(file.name for file in folder.glob("_C*.so"))
        if not built:
            return None, NativeError(_reason_of_the_build(folder), _REMEDY, "")
        reason = (
            f"{', '.join(built)} is installed but cannot be loaded ({error}). Likely causes: it was built for another "
            "Python version or processor, or libstdc++ or libgomp of this machine is older than the one it was built "
            "with."
        )
        return None, NativeError(reason, _REMEDY, trace)


def left_out() -> dict[str, str]:
    """Instruction sets without kernels in the native module -> the reason."""
    module = native()
    if module is None:
        return {}
    reasons = (_build_report(Path(__file__).parent) or {}).get("left_out", {})
    missing = [name for name, isa in module.Isa.__members__.items() if not module.is_compiled(isa)]
    return {name: reasons.get(name, "this processor's family does not have it") for name in missing}


def _reason_of_the_build(folder: Path) -> str:
    """Why the installation did not build the module, from its report."""
    report = _build_report(folder)
    if report is None:
        return "it was never built here, as in a checkout that was not installed."
    return report.get("reason") or "it was built, but its file is gone."


def _build_report(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "_native_build.json").read_text())
    except (OSError, ValueError):
        return None
