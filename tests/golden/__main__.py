"""Runs golden cases: `python -m tests.golden FOLDER... [--implementation reference|fast]`.

Prints each quantity of `expected.npz` with its error and the tolerance. Exit status: 1 if a quantity is off, was not
compared, or is missing; 2 if a case cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mplug2_fast import MPlug2Error
from tests.golden import mplug, mplug2
from tests.golden.cases import CaseError, GoldenCase
from tests.golden.compare import Comparison, compare

KINDS = {**mplug2.KINDS, **mplug.KINDS}
"""Kind of case -> what computes its quantities with an implementation."""
IMPLEMENTATIONS = ("reference", "fast")


def check(case: GoldenCase, implementation: str) -> list[Comparison]:
    """Every quantity of `case`, as computed by `implementation`, against the expected one."""
    kind = case.description["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise CaseError(f"{case.path / 'case.json'} has kind {kind!r}; known kinds are {', '.join(KINDS)}")
    expected = case.expected
    return compare(KINDS[kind](case, implementation), expected)


def report(case: GoldenCase, implementation: str) -> bool:
    """Prints the comparisons of a case. Returns whether all agree."""
    comparisons = check(case, implementation)
    failed = [comparison.name for comparison in comparisons if not comparison.ok]
    print(f"{case.path}: {case.description['kind']}, {implementation}")
    width = max(len(comparison.name) for comparison in comparisons)
    print(f"        {'quantity':{width}}  {'error':9}  tolerance")
    for comparison in comparisons:
        print(comparison.line(width))
    print(
        f"{len(comparisons)} quantities, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}\n", flush=True
    )
    return not failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description="Runs golden cases.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="holds case.json and the .npz files")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="default: both, one after the other")
    options = parser.parse_args(arguments)
    status = 0
    for folder in options.folders:
        case = GoldenCase(folder.absolute())
        try:
            for implementation in [options.implementation] if options.implementation else IMPLEMENTATIONS:
                if not report(case, implementation):
                    status = max(status, 1)
        except (CaseError, MPlug2Error) as error:
            print(f"{folder}: {error}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
