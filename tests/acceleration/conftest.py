"""A call that a fast module leaves to the original's code warns: tests that do not expect it fail."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def no_call_is_left_to_the_original():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*The original's code computes")
        yield
