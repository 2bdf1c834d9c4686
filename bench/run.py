"""`python bench/run.py`: see `bench.cli`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the script's folder on the path; the packages are one level up.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from bench import guard
    from bench.cli import main

    sys.exit(guard.run(main))
