"""Settings that every test runs under, and what tests in many places need."""

import os

import pytest
import torch

from mplug2_fast._native import native, native_error


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: more threads would only get in each other's way
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def native_module():
    """The native module. Tests that need it are skipped without it, or fail if MPLUG2_FAST_NATIVE is "required"."""
    module = native()
    if module is None:
        report = pytest.fail if os.environ.get("MPLUG2_FAST_NATIVE") == "required" else pytest.skip
        report(str(native_error()))
    return module
