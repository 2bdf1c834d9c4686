"""The fast mPLUG-2: the function of `mplug2_fast.reference`, another algorithm."""

from mplug2_fast.models.mplug2.model import MPlug2ForCaptioning, MPlug2ForQuestionAnswering
from mplug2_fast.outputs import GenerationOutput

__all__ = ["GenerationOutput", "MPlug2ForCaptioning", "MPlug2ForQuestionAnswering"]
