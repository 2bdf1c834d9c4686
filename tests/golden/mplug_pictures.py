"""mPLUG: what happens to the picture of a case before it reaches the model."""

from __future__ import annotations

from torch import Tensor

from tests.golden.cases import GoldenCase


def pictures_of(case: GoldenCase) -> dict[str, Tensor]:
    return {}
