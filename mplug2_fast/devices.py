"""Which device and dtype to run on, by name or by what there is."""

from __future__ import annotations

import torch

from mplug2_fast.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device of a name; None and "auto" take the first CUDA device where there is one, otherwise the CPU.

    Raises:
        ConfigError: there is no such device, with the reason.
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
            reason = "this torch is built without CUDA" if torch.version.cuda is None else f"torch sees {count} of them"
            raise ConfigError(f"there is no CUDA device {chosen.index or 0}: {reason}; `mplug2-fast info` tells more")
    return chosen


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of a name; None and "auto" take what `device` is fast and safe in.

    That is float32 on the CPU, bfloat16 on CUDA devices that have it in hardware, and float16 on older ones.
    """
    if dtype is None or dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise ConfigError(f"the model does not run in {dtype}: choose auto, {', '.join(DTYPES)}")
    return chosen
