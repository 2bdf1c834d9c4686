"""Both implementations compute what the official code computed, in float32."""

import pytest

from tests.golden.__main__ import IMPLEMENTATIONS, check
from tests.golden.cases import STORED, GoldenCase

COUNTS = {"caption_a": 7, "caption_b": 7, "qa_a": 11}
COUNTS |= {"mplug_caption": 24, "mplug_grounding": 16, "mplug_retrieval": 31, "mplug_video": 23, "mplug_vqa": 12}
"""Quantities of each case besides gradients."""


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", STORED)
def test_every_expected_quantity_is_computed(name, implementation):
    comparisons = check(GoldenCase(name), implementation)
    assert [comparison.line(0) for comparison in comparisons if not comparison.ok] == []
    gradients = [comparison for comparison in comparisons if comparison.name.startswith("grad:")]
    assert len(gradients) >= 3
    assert len(comparisons) - len(gradients) == COUNTS[name]
