"""The Triton kernels, forward and backward, under Triton's interpreter: the operators' own tests, with "triton" as the
backend. The interpreter is chosen before Triton is imported, so these tests are in processes of their own: two an
operator, for one may take longer than a test is given."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mplug2_fast import ops
from mplug2_fast.ops.runtime import triton

ROOT = Path(__file__).parents[2]
# What an operator without gradients of its own has no tests of is not asked for.
PARTS = {"gradients": "triton and test_gradients", "all else": "triton and not test_gradients"}
RUNS = [
    (name, part)
    for name, function in ops.OPERATORS.items()
    for part in PARTS
    if (backend := function.op.backends.get("triton")) and (part != "gradients" or backend.backward)
]


@pytest.mark.parametrize(("name", "part"), RUNS)
def test_operator(name, part):
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6's interpreter does not work with NumPy 2.4")
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"tests/ops/test_{name}.py",
        "-k",
        PARTS[part],
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout


def test_this_process_does_not_interpret():
    assert not triton.INTERPRETED
