"""mPLUG-2 as a family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mplug2_fast.models.family import Family
from mplug2_fast.models.mplug2.config import MPlug2Config
from mplug2_fast.models.mplug2.infer import infer, recognise
from mplug2_fast.models.mplug2.official_names import MPlug2Names
from mplug2_fast.models.shared_names import WRAPPED_ENCODERS
from mplug2_fast.tasks import AnswerRanking, Captioning, QuestionAnswering, Task

if TYPE_CHECKING:
    from mplug2_fast.models.mplug2.model import MPlug2


def _build(
    config: MPlug2Config, tasks: Sequence[Task], device: torch.device | str, dtype: torch.dtype | None = None
) -> MPlug2:
    from mplug2_fast.models import mplug2

    kinds = {type(task) for task in tasks}  # not of the caller's own subclasses
    if kinds == {Captioning}:
        return mplug2.MPlug2ForCaptioning(config, device=device, dtype=dtype)
    if kinds <= {QuestionAnswering, AnswerRanking}:
        return mplug2.MPlug2ForQuestionAnswering(config, device=device, dtype=dtype)
    return mplug2.MPlug2(config, tasks, device=device, dtype=dtype)


MPLUG2 = Family(MPlug2Config, MPlug2Names, recognise, infer, _build, WRAPPED_ENCODERS)
