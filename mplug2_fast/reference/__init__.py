"""The official mPLUG-2 computation in plain eager PyTorch: the oracle of parity and the baseline of benchmarks.

Written for faithfulness, not speed: the official parameter names, layouts and order of operations, with recomputed
prefixes and tiled memories. Source: arXiv 2302.00402 and the official X-PLUG/mPLUG-2.
"""

from mplug2_fast.reference.mplug2 import MPlug2ForCaptioning, MPlug2ForQuestionAnswering

__all__ = ["MPlug2ForCaptioning", "MPlug2ForQuestionAnswering"]
