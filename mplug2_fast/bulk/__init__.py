"""Runs over many videos that never lose work: see `docs/bulk.md`.

`run` does a `Work` (`Caption`, `Answer`, `Features`) on the videos that `find_videos` or `read_questions` find.
"""

from mplug2_fast.bulk.features import Features, read_features
from mplug2_fast.bulk.ranks import Ranks
from mplug2_fast.bulk.runs import Decoding, Plan, Summary, run
from mplug2_fast.bulk.sources import Question, Source, Sources, ask_all, find_videos, read_questions
from mplug2_fast.bulk.work import Answer, Caption, Frames, Work

__all__ = [
    "Answer",
    "Caption",
    "Decoding",
    "Features",
    "Frames",
    "Plan",
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
]
