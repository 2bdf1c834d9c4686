"""Both implementations compute what the official code computed, in float32."""

import pytest

from tests.golden.__main__ import IMPLEMENTATIONS, check
from tests.golden.cases import STORED, GoldenCase


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", STORED)
def test_every_expected_quantity_is_computed(name, implementation):
    comparisons = check(GoldenCase(name), implementation)
    assert [comparison.line(0) for comparison in comparisons if not comparison.ok] == []
    gradients = [comparison for comparison in comparisons if comparison.name.startswith("grad:")]
    assert len(gradients) >= 8
    assert len(comparisons) - len(gradients) == (7 if name.startswith("caption") else 11)
