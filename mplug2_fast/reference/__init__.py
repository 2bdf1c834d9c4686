"""The released mPLUG-2 computation in plain eager PyTorch: the oracle of parity and the baseline of benchmarks.

Written for faithfulness, not speed: the released parameter names, layouts and order of operations, recomputed prefixes
and tiled memories included. Source: arXiv 2302.00402 and the released X-PLUG/mPLUG-2.
"""

from mplug2_fast.reference.model import MPlug2ForCaptioning, MPlug2ForQuestionAnswering

__all__ = ["MPlug2ForCaptioning", "MPlug2ForQuestionAnswering"]
