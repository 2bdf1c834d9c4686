"""Evaluation: metrics of predictions, and reports that explain them. See `docs/evaluation.md`."""

from mplug2_fast.evaluation.comparison import Change, Comparison, compare
from mplug2_fast.evaluation.metrics import METRICS, Metric, Scores
from mplug2_fast.evaluation.metrics.tokenizer import TOKENIZERS, tokenize
from mplug2_fast.evaluation.precision import BlockError, Difference, PrecisionComparison, compare_dtypes
from mplug2_fast.evaluation.report import ItemResult, Report
from mplug2_fast.evaluation.run import check, evaluate, sources_of
from mplug2_fast.evaluation.scoring import Prediction, Scored, score, score_all

__all__ = [
    "METRICS",
    "TOKENIZERS",
    "BlockError",
    "Change",
    "Comparison",
    "Difference",
    "ItemResult",
    "Metric",
    "PrecisionComparison",
    "Prediction",
    "Report",
    "Scored",
    "Scores",
    "check",
    "compare",
    "compare_dtypes",
    "evaluate",
    "score",
    "score_all",
    "sources_of",
    "tokenize",
]
