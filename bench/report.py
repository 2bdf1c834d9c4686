"""Writes what was measured and what the operators say of themselves into the documentation.

    python bench/report.py            # rewrite the pages and the pictures from bench/results/MACHINE/NAME.json
    python bench/report.py --check    # exit with status 1 if a page is not what the results and operators say

- docs/performance.md, whole: targets, and all that was measured;
- the README and docs/bulk.md, between `<!-- bench:headline -->` or `<!-- bench:MACHINE/NAME -->` and `<!-- /bench -->`;
- docs/operators.md, whole, from the operators' specifications;
- a picture beside the results that have one. Only matplotlib draws them: without it they stay as they are.

Figures are never typed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is on the path; the packages are one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import committed, performance, plots
from bench.committed import Machine

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w./-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet.\n"


def fill(text: str, found: Sequence[Machine]) -> str:
    """The text with every block written anew; a block whose results are not there says so."""
    files = {f"{machine.name}/{file.name}": file for machine in found for file in machine.files}

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name == "headline":
            body = performance.headline(found)
        else:
            body = "\n\n".join(performance.section(files[name])) if name in files else NOT_MEASURED
        return f"{match[1]}{body.rstrip()}\n{match[3]}"

    return BLOCK.sub(block, text)


def operators_page() -> str:
    """docs/operators.md: the axes, the backends and the sizes of every operator, from its specification."""
    from mplug2_fast.ops import OPERATORS

    lines = [
        "# Operators\n",
        "Written by `python bench/report.py` from the specifications in `mplug2_fast/ops`: edit those.",
    ]
    for name, function in OPERATORS.items():
        op, summary = function.op, " ".join((function.__doc__ or "").split("\n\n")[0].split())
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


def pages(root: Path, found: Sequence[Machine]) -> dict[Path, str]:
    """Every page below `root` and what is to stand in it."""
    docs = root / "docs"
    filled = {path: fill(path.read_text(), found) for path in (root / "README.md", docs / "bulk.md") if path.exists()}
    return filled | {
        docs / "performance.md": performance.page(found, docs),
        docs / "operators.md": operators_page(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit with status 1 where it would")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    found = committed.machines(options.root / "bench/results")
    wanted = pages(options.root, found)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    drawn = [file for machine in found for file in machine.files if file.picture is not None]
    if options.check:
        stale += [file.picture for file in drawn if not file.picture.exists()]
        if stale:
            names = " and ".join(path.name for path in stale)
            print(f"{names}: not what the results and operators say: run python bench/report.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
    if plots.available():
        for file in drawn:
            plots.draw(file)
    elif drawn:
        print("note: the pictures were left as they are: matplotlib is not installed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
