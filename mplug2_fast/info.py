"""The report of `mplug2-fast info`: what is installed, what is missing, and why. Attach it to bug reports.

`collect` never raises: a part that cannot be determined becomes `"not known: <reason>"`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mplug2_fast
from mplug2_fast._native import left_out, native, native_error

# Instruction sets that matter to CPU code, with their names in /proc/cpuinfo.
SIMD_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")

REQUIRED_PACKAGES = ("torch", "numpy", "av", "safetensors", "tokenizers", "typer", "rich")
OPTIONAL_PACKAGES = ("triton", "flash_attn", "xformers", "apex")


def collect() -> dict[str, Any]:
    """The report as nested dicts, lists and plain values, ready for JSON.

    Keys: `mplug2_fast`, `python`, `system`, `cpu`, `memory`, `torch`, `cuda`, `packages`, `decoders`, `native`,
    `cuda_kernels`, `triton_kernels`. Sizes are in bytes.
    """
    parts: dict[str, Callable[[], Any]] = {
        "mplug2_fast": _package,
        "python": _python,
        "system": platform.platform,
        "cpu": _cpu,
        "memory": _memory,
        "torch": _torch,
        "cuda": _cuda,
        "packages": _packages,
        "decoders": _decoders,
        "native": _native,
        "cuda_kernels": _cuda_kernels,
        "triton_kernels": _triton_kernels,
    }
    return {name: _guarded(part) for name, part in parts.items()}


def _guarded(part: Callable[[], Any]) -> Any:
    """The result of `part`, or the error of a broken installation."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return part()
    except Exception as error:
        return f"not known: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _package() -> dict[str, str]:
    return {"version": mplug2_fast.__version__, "location": str(Path(mplug2_fast.__file__).parent)}


def _python() -> dict[str, str]:
    version = f"{platform.python_implementation()} {platform.python_version()}"
    return {"version": version, "executable": sys.executable}


def _cpu() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": _guarded(_cpu_model), "simd": _guarded(_simd), "usable_cores": cores, "cores": os.cpu_count()}


def _cpuinfo(*names: str) -> str:
    """The first value of these names in /proc/cpuinfo. Names differ between architectures."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in names:
            return value.strip()
    raise LookupError(f"/proc/cpuinfo has no {' or '.join(names)}")


def _cpu_model() -> str:
    try:
        return _cpuinfo("model name", "Model", "Hardware")
    except (OSError, LookupError):
        return platform.processor() or platform.machine()


def _simd() -> list[str]:
    present = _cpuinfo("flags", "Features").split()
    return [flag for flag in SIMD_FLAGS if flag in present]


def _memory() -> dict[str, int]:
    pages = {"total": "SC_PHYS_PAGES", "available": "SC_AVPHYS_PAGES"}
    memory = {name: os.sysconf(key) * os.sysconf("SC_PAGE_SIZE") for name, key in pages.items()}
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # includes the page cache, which sysconf leaves out
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        memory["available"] = int(lines["MemAvailable"].split()[0]) * 1024
    return memory


def available_memory() -> int:
    """Bytes that are available without swapping."""
    return _memory()["available"]


def total_memory() -> int:
    """The machine's memory in bytes."""
    return _memory()["total"]


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "asks_for_huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "built_for_cuda": torch.version.cuda,
    }


def _cuda() -> dict[str, Any]:
    """The CUDA devices, under `devices`. Without any, `reason` says why."""
    import torch

    if torch.version.cuda is None:
        return {"devices": [], "reason": f"this torch ({torch.__version__}) is built without CUDA"}
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        return {"devices": [], "reason": f"torch is built for CUDA {torch.version.cuda} but sees no device{hidden}"}
    return {"devices": [_guarded(lambda i=i: _cuda_device(i)) for i in range(torch.cuda.device_count())]}


def _cuda_device(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }


def _packages() -> dict[str, str]:
    return {name: _guarded(lambda name=name: _version(name)) for name in REQUIRED_PACKAGES + OPTIONAL_PACKAGES}


def _decoders() -> dict[str, str]:
    """The libraries that decode videos, with their versions, or why they are not available."""
    from mplug2_fast.video.backends import versions

    return versions()


def _version(name: str) -> str:
    """The version, or why the package cannot be used. A package that was built for another torch does not import."""
    if importlib.util.find_spec(name) is None:
        return "not installed" + ("" if name in OPTIONAL_PACKAGES else f": pip install {name}")
    version = _guarded(lambda: importlib.metadata.version(name.replace("_", "-")))
    if name == "apex":
        from mplug2_fast.ops.runtime import apex

        if not apex.is_nvidias():
            return f"{version}, from PyPI, which is not NVIDIA's apex: not used"
    error = _import_error(name)
    return version if error is None else f"{version}, but it cannot be imported: {error}"


def _import_error(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:
        return _one_line(error)
    return None


def _native() -> dict[str, Any]:
    """The native module. `available`; then the instruction set in use, the compiler, whether it has OpenMP, and the
    instruction sets that were left out. If it is not available, `reason`, `remedy` and perhaps `traceback`."""
    error = native_error()
    if error is None:
        from mplug2_fast.ops.runtime import cpu as kernels

        module = native()
        return {
            "available": True,
            "instruction_set": _guarded(lambda: kernels.isa().name),
            "compiler": _guarded(lambda: module.compiler),
            "openmp": _guarded(lambda: module.openmp),
            "left_out": _guarded(left_out),
        }
    found = {"available": False, "reason": error.reason, "remedy": error.remedy}
    return found | ({"traceback": error.traceback.strip()} if error.traceback else {})


def _cuda_kernels() -> dict[str, Any]:
    """The native module's CUDA kernels. `available` says whether they can run. If not, also `reason`."""
    import torch

    from mplug2_fast.ops.runtime import cuda

    reason = cuda.error()
    if reason is None:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        if not any(torch.cuda.get_device_capability(device) == cuda.CAPABILITY for device in devices):
            reason = "there is no CUDA device of compute capability 9.0 to run them on"
    return {"available": reason is None} | ({} if reason is None else {"reason": reason})


def _triton_kernels() -> dict[str, Any]:
    """The names of the Triton kernels. `available` says whether they can run. If not, also `reason`."""
    try:
        kernels = importlib.import_module("mplug2_fast.kernels")
    except ModuleNotFoundError:
        reason = "they are not installed, as in a checkout without an installation: pip install -e ."
        return {"available": False, "kernels": [], "reason": reason}
    names = sorted(module.name for module in pkgutil.iter_modules(kernels.__path__) if not module.name.startswith("_"))
    reason = _why_no_triton() if names else f"mplug2_fast {mplug2_fast.__version__} has no Triton kernels"
    return {"available": reason is None, "kernels": names} | ({} if reason is None else {"reason": reason})


def _why_no_triton() -> str | None:
    import torch

    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    error = _import_error("triton")
    if error is not None:
        return f"triton cannot be imported: {error}"
    return None if torch.cuda.is_available() else "there is no CUDA device to run them on"
