"""setuptools' build backend, which also asks for CUTLASS's headers where kernels for GPUs are going to be built: they
come with packages that other builds need not fetch."""

from __future__ import annotations

import os
import shutil

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

CUTLASS = "nvidia-cutlass>=4.2"


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *headers()]


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *headers()]


def headers() -> list[str]:
    turned_off = "off" in (os.environ.get("MPLUG2_FAST_CUDA"), os.environ.get("MPLUG2_FAST_NATIVE"))
    if turned_off or os.environ.get("MPLUG2_FAST_CUTLASS") or not shutil.which(os.environ.get("CUDACXX") or "nvcc"):
        return []
    return [CUTLASS]
