"""Python objects that users name: `module:Name` or `file.py:Name`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from mplug2_fast.errors import ConfigError


def imported(where: str, name: str, what: str) -> Any:
    """The attribute `name` of a module, or of a `.py` file. Modules are also found in the working directory.

    Runs the module's code.

    Args:
        where: the module or file. name: the attribute. what: "task" or "data", for the error message.

    Raises:
        ConfigError: there is no such module, file or attribute.
    """
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else _from_module(where)
        return getattr(module, name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ConfigError(f"the {what} {where}:{name} cannot be imported: {error}") from error


def _from_module(name: str) -> object:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    return importlib.import_module(name)


def _from_file(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(f"mplug2_fast_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
