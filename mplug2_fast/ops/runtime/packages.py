"""Optional packages that serve operators: looked for when a call first asks for them, never at import."""

from __future__ import annotations

import functools
import importlib

BACKENDS = ("flash_attn", "xformers", "apex")
"""Names of backends that are packages which nothing here requires."""


@functools.cache
def error(module: str, remedy: str) -> str | None:
    """Why the module of a package cannot be used; None where it can.

    Args:
        module: by its full name.
        remedy: what installs it.
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
