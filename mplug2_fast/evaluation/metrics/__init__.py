"""Metrics. `METRICS` has all of them by name; a task's `metrics` name those that fit it."""

from __future__ import annotations

from mplug2_fast.evaluation.metrics import answers, boxes, captions, labels, retrieval
from mplug2_fast.evaluation.metrics.base import Kind, Metric, Scores

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("cider", "text", captions.cider, captions.LIBRARY, tokenized=True),
        Metric("bleu", "text", captions.bleu, captions.LIBRARY, tokenized=True),
        Metric("rouge_l", "text", captions.rouge_l, captions.LIBRARY, tokenized=True),
        Metric("meteor", "text", captions.meteor, captions.LIBRARY, tokenized=True, java=True),
        Metric(
            "spice",
            "text",
            captions.spice,
            captions.LIBRARY,
            tokenized=True,
            java=True,
            opt_in="it downloads models at first use",
        ),
        Metric("exact_match", "text", answers.exact_match),
        Metric("accuracy", "ranking", answers.accuracy),
        Metric("vqa_accuracy", "text", answers.vqa_accuracy),
        Metric("f1", "text", labels.f1, labels.LIBRARY),
        Metric("matthews", "text", labels.matthews, labels.LIBRARY),
        Metric("pearson", "number", labels.pearson, labels.LIBRARY),
        Metric("spearman", "number", labels.spearman, labels.LIBRARY),
        Metric("retrieval", "ranking", retrieval.retrieval, retrieval.LIBRARY, main="recall@1"),
        Metric("boxes", "box", boxes.boxes, main="accuracy@0.5"),
    )
}
"""Name to metric."""

__all__ = ["METRICS", "Kind", "Metric", "Scores"]
