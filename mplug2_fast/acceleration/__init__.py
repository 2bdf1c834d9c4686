"""Accelerating a model in place: `accelerate`, `restore`, `accelerated`."""

from mplug2_fast.acceleration.report import Entry, Report
from mplug2_fast.acceleration.walk import accelerate, accelerated, restore

__all__ = ["Entry", "Report", "accelerate", "accelerated", "restore"]
