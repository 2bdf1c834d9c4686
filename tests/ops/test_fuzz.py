"""A few of the calls of `make fuzz`."""

import pytest

from mplug2_fast import ops
from tests.ops import fuzz


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_random_calls(name, native_module):
    ended = list(fuzz.calls(ops.OPERATORS[name].op, 0, 24))
    assert "compared" in ended
