"""Devices and dtypes by name."""

from __future__ import annotations

import pytest
import torch

from mplug2_fast.devices import pick_device, pick_dtype
from mplug2_fast.errors import ConfigError

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [None, "auto"])
def test_auto_takes_a_gpu_where_there_is_one(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(name) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(name) == torch.device("cuda")


def test_devices_by_name_and_by_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cpu") == pick_device(CPU) == CPU
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cuda") == torch.device("cuda")


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", "", "cpu0"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="choose auto, cpu, cuda or cuda:N"):
        pick_device(name)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device 0: this torch is built without CUDA"):
        pick_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="no CUDA device 2: torch sees 2 devices"):
        pick_device("cuda:2")


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_auto_dtype(capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for name in (None, "auto"):
        assert pick_dtype(name, CPU) == torch.float32
        assert pick_dtype(name, torch.device("cuda")) == expected


def test_dtypes_by_name_and_by_object() -> None:
    assert pick_dtype("float16", CPU) == pick_dtype(torch.float16, CPU) == torch.float16


@pytest.mark.parametrize("dtype", ["half", "float64", torch.float64, torch.int8])
def test_other_dtypes_are_refused(dtype: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match="choose auto, float32, bfloat16, float16"):
        pick_dtype(dtype, CPU)
