"""Bulk runs and training on Ray clusters. This package imports Ray when it is used."""

from mplug2_fast.ray.steps import Answers, Captions, Results
from mplug2_fast.ray.training import train

__all__ = ["Answers", "Captions", "Results", "train"]
