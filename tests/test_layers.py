"""The layers of the package: imports point downwards and form no circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"mplug2_fast": "mplug2_fast", "kernels": "mplug2_fast.kernels", "bench": "bench"}
LAYERS = (
    ("cli",),
    ("ray",),
    ("training",),
    ("evaluation",),
    ("bulk",),
    ("predict",),
    ("checkpoint",),
    ("reference",),
    ("models",),
    ("tasks",),
    ("generation", "acceleration"),
    ("nn",),
    ("datasets",),
    ("images",),
    ("video", "text"),
    ("ops",),
    ("kernels",),
)
"""From top to bottom. A layer imports lower layers only, and nothing of another part of the same layer."""
UPWARD: dict[tuple[str, str], str] = {}
"""(module, imported module) -> why this upward import is right."""


def read_modules() -> dict[str, ast.Module]:
    """Name -> parsed source of every module."""
    modules = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            if not path.is_symlink() and not (folder == "mplug2_fast" and parts[0] == "kernels"):
                modules[name] = ast.parse(path.read_text())
    return modules


MODULES = read_modules()


def imports(name: str, *, everywhere: bool) -> Iterator[str]:
    """The modules of the repository that a module imports: when it is imported, or `everywhere`, which adds functions
    and TYPE_CHECKING."""
    statements: list[ast.AST] = [MODULES[name]]
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found = full if full in MODULES else node.module
                if found in MODULES:
                    yield found
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if everywhere or not (function or typing):
            statements += ast.iter_child_nodes(node)


def test_no_import_circles():
    graph = {name: {*imports(name, everywhere=False)} - {name} for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def layer(module: str) -> tuple[int, str] | None:
    """The rank and the part of a module; None for one that is no part of a layer."""
    _, _, rest = module.partition("mplug2_fast.")
    part = rest.partition(".")[0]
    return next(((rank, part) for rank, parts in enumerate(LAYERS) if part in parts), None)


def test_no_upward_imports():
    found = {}
    for name in MODULES:
        for imported in imports(name, everywhere=True):
            here, there = layer(name), layer(imported)
            if here and there and here != there and there[0] <= here[0]:
                found[name, imported] = f"{here[1]} imports {there[1]}"
    assert {pair: why for pair, why in found.items() if pair not in UPWARD} == {}
    assert UPWARD.keys() <= found.keys(), "these exceptions are not needed any more"
