"""The official computation of mPLUG and mPLUG-2 in eager PyTorch: the oracle of parity, the baseline of benchmarks.

Written for faithfulness, not speed: the official parameter names, layouts and order of operations, with recomputed
prefixes and tiled memories. Sources: arXiv 2302.00402 and 2205.12005, and the official X-PLUG/mPLUG-2 and X-PLUG/mPLUG.
"""

from mplug2_fast.reference.mplug import MPlug
from mplug2_fast.reference.mplug2 import (
    MPlug2ForCaptioning,
    MPlug2ForPreTraining,
    MPlug2ForQuestionAnswering,
    MPlug2ForRetrieval,
)

__all__ = ["MPlug", "MPlug2ForCaptioning", "MPlug2ForPreTraining", "MPlug2ForQuestionAnswering", "MPlug2ForRetrieval"]
