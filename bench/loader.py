"""The data loader of training: whether it or the step bounds a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from mplug2_fast import MPlug2Config
from mplug2_fast.datasets import Item
from mplug2_fast.tasks import get
from mplug2_fast.text import Tokenizer
from mplug2_fast.training.data import ItemDataset, StepDataset

CAPTION = "a red square moves left"


def save(video: Path, batch: int, exchange: Path) -> None:
    """Writes what the loader of another process reads."""
    shutil.copy(video, exchange / f"clip{video.suffix}")
    torch.save(batch, exchange / "batch.pt")


class Loader:
    """Batches of captioning as training has them, one after another in this process: decoding, augmentation, pixels.

    Args:
        config: of the model.
        exchange: folder of `save`. It is read with the first batch.
    """

    def __init__(self, config: MPlug2Config, exchange: Path) -> None:
        self.config, self.exchange, self.steps, self.number = config, exchange, None, 0

    def __call__(self) -> Tensor:
        """The videos of the next batch."""
        if self.steps is None:
            (clip,) = self.exchange.glob("clip.*")
            batch, task = torch.load(self.exchange / "batch.pt"), get("captioning")
            items = [Item(str(n), video=str(clip), caption=(CAPTION,)) for n in range(batch)]
            data = ItemDataset(items, [task], self.config.vision, augment="none")
            self.steps = StepDataset(data, [task], Tokenizer.from_vocab(None), self.config, batch_size=batch)
        step = self.steps[self.number]
        self.number += 1
        return step.parts[0].tensors["captioning"]["video"]
