"""A fast implementation of mPLUG-2 and mPLUG.

Importing the package loads torch and numpy. Everything else is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mplug2_fast import (
        acceleration,
        bulk,
        checkpoint,
        datasets,
        evaluation,
        generation,
        kernels,
        models,
        nn,
        ops,
        predict,
        ray,
        reference,
        text,
        training,
        video,
    )
    from mplug2_fast.acceleration import accelerate, accelerated, restore
    from mplug2_fast.checkpoint import (
        from_pretrained,
        load_official,
        load_released,
        official_state_dict,
        released_state_dict,
    )
    from mplug2_fast.errors import CheckpointError, ConfigError, DataError, MPlug2Error, NotFiniteError, VideoError
    from mplug2_fast.models.mplug import MPlug
    from mplug2_fast.models.mplug.config import MPlugConfig
    from mplug2_fast.models.mplug2 import GenerationOutput, MPlug2, MPlug2ForCaptioning, MPlug2ForQuestionAnswering
    from mplug2_fast.models.mplug2.config import MPlug2Config
    from mplug2_fast.predict import Answerer, Captioner, Classifier, Grounder, Matcher, Retriever
    from mplug2_fast.training import Trainer
    from mplug2_fast.video import load_video

# Public name -> the module that it is imported from when it is first used.
_EXPORTS = {
    "MPlug2Config": "mplug2_fast.models.mplug2.config",
    "MPlug2Error": "mplug2_fast.errors",
    "ConfigError": "mplug2_fast.errors",
    "CheckpointError": "mplug2_fast.errors",
    "DataError": "mplug2_fast.errors",
    "NotFiniteError": "mplug2_fast.errors",
    "VideoError": "mplug2_fast.errors",
    "MPlug2": "mplug2_fast.models.mplug2",
    "MPlug2ForCaptioning": "mplug2_fast.models.mplug2",
    "MPlug2ForQuestionAnswering": "mplug2_fast.models.mplug2",
    "GenerationOutput": "mplug2_fast.models.mplug2",
    "MPlug": "mplug2_fast.models.mplug",
    "MPlugConfig": "mplug2_fast.models.mplug.config",
    "load_official": "mplug2_fast.checkpoint",
    "load_released": "mplug2_fast.checkpoint",
    "official_state_dict": "mplug2_fast.checkpoint",
    "released_state_dict": "mplug2_fast.checkpoint",
    "from_pretrained": "mplug2_fast.checkpoint",
    "load_video": "mplug2_fast.video",
    "Trainer": "mplug2_fast.training",
    "accelerate": "mplug2_fast.acceleration",
    "accelerated": "mplug2_fast.acceleration",
    "restore": "mplug2_fast.acceleration",
    "Answerer": "mplug2_fast.predict",
    "Captioner": "mplug2_fast.predict",
    "Classifier": "mplug2_fast.predict",
    "Grounder": "mplug2_fast.predict",
    "Matcher": "mplug2_fast.predict",
    "Retriever": "mplug2_fast.predict",
}
_MODULES = (
    "acceleration",
    "bulk",
    "checkpoint",
    "datasets",
    "evaluation",
    "kernels",
    "generation",
    "models",
    "nn",
    "ops",
    "ray",
    "reference",
    "predict",
    "tasks",
    "text",
    "training",
    "video",
)

__all__ = [
    "Answerer",
    "Captioner",
    "CheckpointError",
    "Classifier",
    "ConfigError",
    "DataError",
    "GenerationOutput",
    "Grounder",
    "MPlug",
    "MPlug2",
    "MPlug2Config",
    "MPlug2Error",
    "MPlug2ForCaptioning",
    "MPlug2ForQuestionAnswering",
    "MPlugConfig",
    "Matcher",
    "NotFiniteError",
    "Retriever",
    "Trainer",
    "VideoError",
    "__version__",
    "accelerate",
    "accelerated",
    "acceleration",
    "bulk",
    "checkpoint",
    "datasets",
    "evaluation",
    "from_pretrained",
    "generation",
    "kernels",
    "load_official",
    "load_released",
    "load_video",
    "models",
    "nn",
    "official_state_dict",
    "ops",
    "predict",
    "ray",
    "reference",
    "released_state_dict",
    "restore",
    "tasks",
    "text",
    "training",
    "video",
]


if not TYPE_CHECKING:  # a name that is not imported above is an error to a type checker

    def __getattr__(name: str) -> Any:
        if name in _EXPORTS:
            return getattr(importlib.import_module(_EXPORTS[name]), name)
        if name in _MODULES:
            return importlib.import_module(f"mplug2_fast.{name}")
        raise AttributeError(f"module 'mplug2_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
