"""Runs over many videos that never lose work: see `docs/bulk.md`.

`run` does a `Work` (`Predict`, `Features`) on the videos that `find_videos` or `read_questions` find.
"""

from mplug2_fast.bulk.features import Features, read_features
from mplug2_fast.bulk.ranks import Ranks
from mplug2_fast.bulk.runs import Decoding, Plan, Summary, run
from mplug2_fast.bulk.sources import Question, Source, Sources, ask_all, find_videos, read_questions, texts_alone
from mplug2_fast.bulk.work import Frames, Predict, Work

__all__ = [
    "Decoding",
    "Features",
    "Frames",
    "Plan",
    "Predict",
    "Question",
    "Ranks",
    "Source",
    "Sources",
    "Summary",
    "Work",
    "ask_all",
    "find_videos",
    "read_features",
    "read_questions",
    "run",
    "texts_alone",
]
