"""A call that a fast module cannot serve warns: tests that do not expect it, by the mark `unserved_calls`, fail."""

import warnings

import pytest

from mplug2_fast.acceleration import gain
from mplug2_fast.acceleration.swap import Kind


@pytest.fixture(autouse=True)
def no_call_is_left_to_the_original(request):
    action = "error" if request.node.get_closest_marker("unserved_calls") is None else "ignore"
    with warnings.catch_warnings():
        warnings.filterwarnings(action, message=".*The original's code computes")
        yield


@pytest.fixture(autouse=True)
def everything_gains(request, monkeypatch):
    """The models of tests are too small to gain. Tests marked `real_sizes` see what a user sees."""
    if request.node.get_closest_marker("real_sizes") is None:
        for name in ("of_norm", "of_product", "of_block", "of_local_temporal"):
            monkeypatch.setattr(gain, name, lambda *_, **__: True)
        for name in ("least_of_norm", "least_of_product"):
            monkeypatch.setattr(gain, name, lambda *_: 0)
        for kind in (Kind, *Kind.__subclasses__()):
            monkeypatch.setattr(kind, "is_faster_in_training", True)
