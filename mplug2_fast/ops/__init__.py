"""Functional operators: each checks its input, picks a backend and says so when it is not the fastest."""

from mplug2_fast.ops.preprocess_frames import preprocess_frames

__all__ = ["preprocess_frames"]
