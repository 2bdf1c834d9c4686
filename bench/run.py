"""`python bench/run.py`: see `bench.cli`, and `bench.ops.cli` for `--ops`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is on the path; the packages are one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    arguments = sys.argv[1:]
    if any(argument.split("=")[0] == "--ops" for argument in arguments):
        from bench.ops.cli import main
    else:
        from bench.cli import main

    sys.exit(main(arguments))
