"""A small Ray on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def local_ray(**variables: str) -> Iterator[Any]:
    """Ray with two CPUs, whose workers import the tests and have these environment variables."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=80 * 2**20,
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1]), **variables}},
        )
        try:
            yield ray
        finally:
            ray.shutdown()
