"""Writes measured results and the operators' specifications into the documentation.

    python bench/report.py            # rewrite pages and pictures from bench/results/MACHINE/NAME.json
    python bench/report.py --check    # exit with status 1 if a page is out of date

It writes
- docs/performance.md: targets and all results;
- blocks of README.md and docs/bulk.md between `<!-- bench:headline -->` or `<!-- bench:MACHINE/NAME -->` and
  `<!-- /bench -->`;
- docs/operators.md from the operators' specifications;
- a picture beside results that have one, if matplotlib is installed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Python puts the script's folder on the path; the packages are one level up.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import committed, performance, plots
from bench.committed import Machine

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w./-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet.\n"


def fill(text: str, found: Sequence[Machine]) -> str:
    """The text with all blocks rewritten. A block without results says so."""
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
    """docs/operators.md: axes, backends and sizes of each operator, from its specification."""
    from mplug2_fast.ops import OPERATORS

    lines = [
        "# Operators\n",
        "`python bench/report.py` writes this page from the specifications in `mplug2_fast/ops`.",
    ]
    for name, function in OPERATORS.items():
        op, summary = function.op, " ".join((function.__doc__ or "").split("\n\n")[0].split())
        other = "any device" if "cpu" in op.spec.devices else "if forced"
        backends = ", ".join(f"{b.name} ({' and '.join(b.devices) or other})" for b in op.backends.values())
        lines += [
            f"\n## `{name}`\n",
            f"{summary}\n",
            "| argument | axes |",
            "| --- | --- |",
            *(f"| {argument} | {axes} |" for argument, axes in op.spec.axes.items()),
            f"\nBackends, in the order of preference: {backends}.",
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
    """Each page below `root` and its text."""
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
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
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
            print(f"out of date: {names}: run python bench/report.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
    if plots.available():
        for file in drawn:
            plots.draw(file.kind, file.held, file.picture)
    elif drawn:
        print("note: pictures are unchanged, because matplotlib is not installed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
