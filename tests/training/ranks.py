"""Runs on two ranks, for test_ranks.py: started by torchrun with a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from mplug2_fast.training import Trainer, make_recipe
from tests.training.conftest import values_of


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    for name, changes in {
        "ddp": {},
        "fsdp": {"strategy": "fsdp", "ema": 0.5},
        "mixed": {"sources": TWO, "seed": 3},
    }.items():
        Trainer(make_recipe(values_of(folder / name, **{"save_every": 3, **changes})), note=print).train()
    dist.destroy_process_group()


TWO = [
    {"data": "tests.training.data:Noise", "task": "captioning", "batch_size": 2},
    {"data": "tests.training.data:Noise", "task": "question_answering", "batch_size": 2},
]

if __name__ == "__main__":
    main(Path(sys.argv[1]))
