"""Metrics of boxes (center x, center y, width, height)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mplug2_fast.evaluation.metrics.base import Box, Scores, mean, percent


def boxes(predictions: Sequence[Box | None], references: Sequence[Box]) -> Scores:
    """The mean IoU and GIoU, and the share of boxes with an IoU of at least 0.5. A missing box has the lowest."""
    there = torch.tensor([box is not None for box in predictions])
    iou, giou = overlaps(torch.tensor([box or (0.0, 0.0, 0.0, 0.0) for box in predictions]), torch.tensor(references))
    items = {
        "iou": percent(iou.where(there, 0).tolist()),
        "giou": percent(giou.where(there, -1).tolist()),
        "accuracy@0.5": percent(((iou >= 0.5) & there).tolist()),
    }
    return Scores({name: mean(values) for name, values in items.items()}, items)


def overlaps(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU `(boxes,)` of boxes `(boxes, 4)`, pair by pair."""
    corners = [
        torch.cat((box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2), dim=1).double() for box in (one, other)
    ]
    low, high = torch.stack(corners)[:, :, :2], torch.stack(corners)[:, :, 2:]
    areas = (high - low).prod(dim=2).sum(dim=0)
    shared = (high.amin(dim=0) - low.amax(dim=0)).clamp(min=0).prod(dim=1)
    union = areas - shared
    hull = (high.amax(dim=0) - low.amin(dim=0)).prod(dim=1)
    iou = torch.where(union > 0, shared / union, 0.0)
    return iou, iou - torch.where(hull > 0, (hull - union) / hull, 0.0)
