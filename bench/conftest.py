"""Options of `pytest bench`."""

from __future__ import annotations

import pytest

from bench.row import SIZES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("operators")
    group.addoption("--sizes", choices=SIZES, default="base", help="of operators (default: base)")
    group.addoption("--device", default="cpu", help="cpu or cuda (default: cpu)")
