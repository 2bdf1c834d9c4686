"""The Triton kernels under Triton's interpreter: the tests in tests/ops that have "triton" among their parameters.

The interpreter is chosen before Triton is imported, so they run in separate processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mplug2_fast import ops
from mplug2_fast.ops.runtime import triton

ROOT = Path(__file__).parents[2]
NAMES = sorted(name for name, function in ops.OPERATORS.items() if "triton" in function.op.backends)
PROCESSES = 2


@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", [NAMES[i::PROCESSES] for i in range(PROCESSES)], ids=", ".join)
def test_operators(names):
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6's interpreter does not work with NumPy 2.4")
    files = [f"tests/ops/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", *files, "-k", "triton", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout


def test_this_process_does_not_interpret():
    assert not triton.INTERPRETED
