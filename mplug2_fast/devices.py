"""Chooses the device and the dtype, by name or automatically."""

from __future__ import annotations

import torch

from mplug2_fast.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

INT8, FP8 = "int8", "fp8"
"""Formats of 8-bit weights of linear layers. Not dtypes of parameters: see `Model.quantise`."""
_EIGHT_BIT = {INT8: INT8, torch.int8: INT8, FP8: FP8, torch.float8_e4m3fn: FP8}


def eight_bit(dtype: str | torch.dtype | None) -> str | None:
    """The format of 8-bit weights that is meant, or None."""
    return _EIGHT_BIT.get(dtype)


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device of a name. None and "auto" choose the first CUDA device if there is one, otherwise the CPU.

    Raises:
        ConfigError: there is no such device. The message says why.
    """
    if device is None or str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"there is no device {str(device)!r}: choose auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            reason = "this torch is built without CUDA" if torch.version.cuda is None else f"torch sees {count} devices"
            raise ConfigError(f"there is no CUDA device {chosen.index or 0}: {reason}; see `mplug2-fast info`")
    return chosen


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of a name. None and "auto" choose a fast and safe one for the device.

    This is float32 on the CPU, bfloat16 on CUDA devices that support it in hardware, and float16 on older ones.
    """
    if dtype is None or dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise ConfigError(f"the dtype {dtype} is not supported: choose auto, {', '.join(DTYPES)}, {INT8} or {FP8}")
    return chosen
