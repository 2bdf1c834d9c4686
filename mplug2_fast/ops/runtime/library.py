"""The namespace `torch.ops.mplug2_fast`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("mplug2_fast", "DEF")


def register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers `torch.ops.mplug2_fast.NAME` for every device, and returns it.

    Args:
        schema: `"(Tensor x, float eps) -> Tensor"`.
        fake: takes the same arguments, returns empty results.
    """
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mplug2_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.mplug2_fast, name).default
