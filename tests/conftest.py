"""Settings of all tests, and fixtures that many tests use."""

import os
import time
from collections.abc import Iterator

import pytest
import torch

from mplug2_fast._native import native, native_error

DEADLINE = float(os.environ.get("MPLUG2_FAST_DEADLINE", "inf"))
"""Unix time after which no test starts, so that the report of earlier tests is written."""
GPU_REQUIRED = os.environ.get("MPLUG2_FAST_GPU") == "required"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", 'gpu: skipped without a CUDA device; with MPLUG2_FAST_GPU="required" skipping it is a failure'
    )
    if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: more threads would only get in each other's way
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest tests first, so that all workers finish at about the same time."""
    if hasattr(config, "workerinput"):  # a process that a worker starts inherits its variables, but not this
        items.sort(key=lambda item: "test_interpreter" not in item.nodeid)


def needs_gpu(item: pytest.Item) -> bool:
    """By its marker, or as a test of a Triton kernel, whose backend is among its parameters."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return item.get_closest_marker("gpu") is not None or "triton" in map(str, parameters.values())


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > DEADLINE:
        item.session.shouldstop = "the time for all tests is up"
        pytest.fail("not run: the time for all tests is up", pytrace=False)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Turns skips into failures where a GPU is required."""
    outcome = yield
    report = outcome.get_result()
    if GPU_REQUIRED and report.skipped and not hasattr(report, "wasxfail") and needs_gpu(item):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"MPLUG2_FAST_GPU is required, and this was not run: {why}"


@pytest.fixture(scope="session")
def native_module():
    """The native module. Tests that need it are skipped without it, or fail if MPLUG2_FAST_NATIVE is "required"."""
    module = native()
    if module is None:
        report = pytest.fail if os.environ.get("MPLUG2_FAST_NATIVE") == "required" else pytest.skip
        report(str(native_error()))
    return module


@pytest.fixture
def serving(request):
    """Requires the native module if the test's parameter `backend` needs it."""
    if request.node.callspec.params["backend"] == "cpu":
        request.getfixturevalue("native_module")
