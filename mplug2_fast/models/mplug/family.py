"""mPLUG as a family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mplug2_fast.models.family import Family
from mplug2_fast.models.mplug.config import MPlugConfig
from mplug2_fast.models.mplug.infer import infer, recognise
from mplug2_fast.models.mplug.official_names import MPlugNames
from mplug2_fast.models.shared_names import WRAPPED_ENCODERS
from mplug2_fast.tasks import Task

if TYPE_CHECKING:
    from mplug2_fast.models.mplug.model import MPlug


def _build(
    config: MPlugConfig, tasks: Sequence[Task], device: torch.device | str, dtype: torch.dtype | None = None
) -> MPlug:
    from mplug2_fast.models import mplug

    return mplug.MPlug(config, tasks, device=device, dtype=dtype)


MPLUG = Family(
    MPlugConfig, MPlugNames, recognise, infer, _build, WRAPPED_ENCODERS, marks={"bbox_prob_mask": "grounding"}
)
