"""The report of `info`: its contents, and that a broken installation does not make it fail."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mplug2_fast
from mplug2_fast import _native, info
from mplug2_fast.ops.runtime import cuda

PARTS = [
    "mplug2_fast",
    "python",
    "system",
    "cpu",
    "memory",
    "torch",
    "cuda",
    "packages",
    "decoders",
    "native",
    "cuda_kernels",
    "triton_kernels",
]


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("broken\non purpose")


def test_the_report_of_this_machine() -> None:
    found = info.collect()
    assert list(found) == PARTS
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["mplug2_fast"]["version"] == mplug2_fast.__version__
    assert found["python"]["executable"] == sys.executable
    assert found["torch"]["version"] == torch.__version__
    assert found["torch"]["threads"] == torch.get_num_threads()
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["decoders"]["pyav"] == importlib.metadata.version("av")
    assert set(found["decoders"]) == {"pyav", "torchcodec", "dali"}
    assert found["cpu"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert found["native"]["available"] == (_native.native() is not None)


def test_memory_agrees_with_the_kernel() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert info.collect()["memory"]["total"] == pytest.approx(int(total.split()[1]) * 1024, rel=0.05)


def test_simd_flags_are_those_that_the_code_chooses_by(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse avx2 amx_bf16 avx512f avx512_bf16\n"
    monkeypatch.setattr(Path, "read_text", lambda self: cpuinfo)
    assert info._simd() == ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]
    assert info._cpu_model() == "Some CPU"


@pytest.mark.parametrize("part", [f"_{name}" for name in PARTS if name not in ("mplug2_fast", "system")])
def test_a_part_that_fails_is_told_as_text(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, part, broken)
    found = info.collect()
    assert list(found) == PARTS
    assert found[part.removeprefix("_")] == "not known: RuntimeError: broken on purpose"


def test_everything_broken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", broken)
    monkeypatch.setattr(Path, "exists", broken)
    monkeypatch.setattr(os, "sysconf", broken)
    monkeypatch.setattr(torch, "get_num_threads", broken)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(importlib.util, "find_spec", broken)
    monkeypatch.setattr(info, "native_error", broken)
    found = info.collect()
    json.dumps(found)
    for part in ("memory", "torch", "cuda", "native"):
        assert found[part] == "not known: RuntimeError: broken on purpose"
    assert found["packages"]["torch"] == "not known: RuntimeError: broken on purpose"
    assert found["cpu"]["simd"] == "not known: RuntimeError: broken on purpose"
    assert found["cpu"]["cores"] == os.cpu_count()


def test_cuda_devices_and_why_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert info._cuda() == {"devices": [], "reason": f"this torch ({torch.__version__}) is built without CUDA"}

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert info._cuda()["reason"] == "torch is built for CUDA 13.0 but sees no device (CUDA_VISIBLE_DEVICES is '')"

    properties = SimpleNamespace(name="H", major=9, minor=0, total_memory=2**30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties if i == 0 else broken())
    first, second = info._cuda()["devices"]
    assert first == {"name": "H", "capability": "9.0", "memory": 2**30, "multiprocessors": 132}
    assert second == "not known: RuntimeError: broken on purpose"


def test_packages_that_are_not_installed_or_do_not_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(info, "REQUIRED_PACKAGES", ("mplug2_needed",))
    monkeypatch.setattr(info, "OPTIONAL_PACKAGES", ("mplug2_wanted", "mplug2_broken"))
    (tmp_path / "mplug2_broken.py").write_text("raise ImportError('undefined symbol: _ZN2at')")
    monkeypatch.syspath_prepend(tmp_path)
    packages = info._packages()
    assert packages["mplug2_needed"] == "not installed: pip install mplug2_needed"
    assert packages["mplug2_wanted"] == "not installed"
    assert packages["mplug2_broken"].endswith("cannot be imported: ImportError: undefined symbol: _ZN2at")


def test_a_missing_native_module_comes_with_reason_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "native_error", lambda: None)
    assert info._native()["available"] is True
    monkeypatch.setattr(info, "native_error", lambda: _native.NativeError("no compiler.", "Install one.", ""))
    assert info._native() == {"available": False, "reason": "no compiler.", "remedy": "Install one."}
    monkeypatch.setattr(info, "native_error", lambda: _native.NativeError("r", "m", "Traceback\n"))
    assert info._native()["traceback"] == "Traceback"


def test_cuda_kernels_and_why_they_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "error", lambda: "there was no CUDA compiler")
    assert info._cuda_kernels() == {"available": False, "reason": "there was no CUDA compiler"}

    monkeypatch.setattr(cuda, "error", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8 + device, 0))
    assert info._cuda_kernels() == {"available": True}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert info._cuda_kernels()["reason"] == "there is no CUDA device of compute capability 9.0 to run them on"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert info._cuda_kernels()["available"] is False


def test_triton_kernels_and_why_they_do_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernels = SimpleNamespace(__path__=[str(tmp_path)])
    modules: dict[str, SimpleNamespace | None] = {"triton": None}

    def import_module(name: str) -> SimpleNamespace | None:
        if name not in modules:
            raise ModuleNotFoundError(name)
        return modules[name]

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    assert "pip install" in info._triton_kernels()["reason"]
    modules["mplug2_fast.kernels"] = kernels
    assert info._triton_kernels()["reason"].endswith("has no Triton kernels")
    (tmp_path / "local_temporal.py").touch()
    (tmp_path / "_shared.py").touch()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert info._triton_kernels() == {"available": True, "kernels": ["local_temporal"]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert info._triton_kernels()["reason"] == "there is no CUDA device to run them on"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert info._triton_kernels()["reason"] == "triton is not installed: pip install triton"
