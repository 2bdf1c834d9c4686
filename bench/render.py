"""Writes measured results into the README and docs/bulk.md, between `<!-- bench:NAME -->` and `<!-- /bench -->`, and
what the operators say of themselves into docs/operators.md.

    python bench/render.py            # rewrite the tables from bench/results/NAME.json
    python bench/render.py --check    # exit with status 1 if a file is not what the results and operators say

Figures are never typed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # A script's own folder is on the path; the packages are one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
OPERATORS = ROOT / "docs/operators.md"
BULK = ROOT / "docs/bulk.md"
BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def markdown(results: Mapping[str, Any]) -> str:
    """The table, what it was measured on, and the command."""
    from bench import bulk, table
    from bench.ops import table as operators

    if "rows" not in results:
        return bulk.markdown(results)
    if "op" in results["rows"][0]:
        return operators.markdown(results)
    rows, meaning = table.marked(results["rows"])
    text = ("level", "implementation", "dtype", "backend")
    lines = [
        " | ".join(table.COLUMNS),
        " | ".join(":---" if head in text else "---:" for head in table.COLUMNS),
        *(" | ".join(cell(row).strip() for cell in table.COLUMNS.values()) for row in rows),
    ]
    notes = [f"{table.title(results)}. {table.ceilings(results)}", meaning]
    return "\n".join(f"| {line} |" for line in lines) + "\n\n" + "\n".join(filter(None, notes)) + "\n"


def render(text: str, folder: Path) -> str:
    """The text with every block filled from `folder/NAME.json`; a block without such a file says so."""

    def fill(block: re.Match[str]) -> str:
        path = folder / f"{block['name']}.json"
        body = markdown(json.loads(path.read_text())) if path.exists() else "Not measured yet.\n"
        return block[1] + body + block[3]

    return BLOCK.sub(fill, text)


def operators_page(_: str = "") -> str:
    """docs/operators.md: the axes, the backends and the sizes of every operator, from its specification."""
    from mplug2_fast.ops import OPERATORS

    lines = [
        "# Operators\n",
        "Written by `python bench/render.py` from the specifications in `mplug2_fast/ops`: edit those.",
    ]
    for name, function in OPERATORS.items():
        op, summary = function.op, (function.__doc__ or "").splitlines()[0]
        backends = ", ".join(f"{b.name} ({' and '.join(b.devices) or 'any device'})" for b in op.backends.values())
        lines += [
            f"\n## `{name}`\n",
            f"{summary}\n",
            "| argument | axes |",
            "| --- | --- |",
            *(f"| {argument} | {axes} |" for argument, axes in op.spec.axes.items()),
            f"\nBackends, in the order in which they are tried: {backends}.",
            f"Gradients: {', '.join(op.spec.differentiable) or 'none'}. Registered as `torch.ops.mplug2_fast.{name}`.",
            "Measured at: "
            + "; ".join(
                f"{key}: {', '.join(f'{size} {value}' for size, value in sizes.items())}"
                for key, sizes in op.spec.models.items()
            )
            + ".",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/render.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit with status 1 where it would")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    stale = []
    pages = (
        (options.readme, lambda old: render(old, options.results)),
        (BULK, lambda old: render(old, RESULTS)),
        (OPERATORS, operators_page),
    )
    for path, render_text in pages:
        present = path.read_text() if path.exists() else ""
        wanted = render_text(present)
        if wanted != present:
            stale.append(path)
            if not options.check:
                path.write_text(wanted)
    if options.check and stale:
        names = " and ".join(path.name for path in stale)
        print(f"{names}: not what the results and operators say: run python bench/render.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
