"""Warnings about unserved calls fail tests without the mark `unserved_calls`."""

import warnings

import pytest

from mplug2_fast.acceleration import gain
from mplug2_fast.acceleration.swap import Kind
from mplug2_fast.acceleration.walk import KINDS


@pytest.fixture(autouse=True)
def unserved_calls_fail(request):
    action = "error" if request.node.get_closest_marker("unserved_calls") is None else "ignore"
    with warnings.catch_warnings():
        warnings.filterwarnings(action, message=".*The original code runs")
        yield


@pytest.fixture(autouse=True)
def every_size_pays(request, monkeypatch):
    """Disables minimum sizes, because test models are small. Tests marked `real_sizes` keep them."""
    if request.node.get_closest_marker("real_sizes") is None:
        for name in ("of_norm", "of_product", "of_block", "of_local_temporal", "of_int8"):
            monkeypatch.setattr(gain, name, lambda *_, **__: True)
        for name in ("small_for_norm", "small_for_product", "small_for_int8"):
            monkeypatch.setattr(gain, name, lambda *_: gain.TooSmall())
        monkeypatch.setattr(gain, "rows_for_int8", lambda size: 1)
        for kind in (Kind, *KINDS):
            monkeypatch.setattr(kind, "is_faster_in_training", True)
