"""Optional packages that serve operators. They are imported when a call first needs them."""

from __future__ import annotations

import functools
import importlib

BACKENDS = ("flash_attn", "xformers", "apex")
"""Backends that are optional packages."""


@functools.cache
def error(module: str, remedy: str) -> str | None:
    """Why a module of a package cannot be used; None if it can.

    Args:
        module: its full name.
        remedy: the command that installs it.
    """
    package = module.split(".")[0]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as found:
        if found.name == package:
            return f"{package} is not installed: {remedy}"
        return f"{package} cannot be imported ({found}): {remedy}"
    except Exception as found:  # built for another torch, say
        return f"{package} cannot be imported ({type(found).__name__}: {found}): {remedy}"
    return None
