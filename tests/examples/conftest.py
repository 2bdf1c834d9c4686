"""The examples are not part of the installed package: they are imported from the repository root."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
