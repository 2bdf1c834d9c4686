"""Writes measured results into the README, between `<!-- bench:NAME -->` and `<!-- /bench -->`.

    python bench/render.py            # rewrite the tables from bench/results/NAME.json
    python bench/render.py --check    # exit with status 1 if README.md is not what the results say

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
BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def markdown(results: Mapping[str, Any]) -> str:
    """The table, what it was measured on, and the command."""
    from bench import table

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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/render.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit with status 1 where it would")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    present = options.readme.read_text()
    wanted = render(present, options.results)
    if options.check and wanted != present:
        print(f"{options.readme.name} is not what the results say: run python bench/render.py", file=sys.stderr)
        return 1
    if not options.check:
        options.readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
