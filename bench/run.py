"""`python bench/run.py`: see `bench.cli`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder is on the path; the packages are one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from bench import guard
    from bench.cli import main

    sys.exit(guard.run(main))
