"""Runs on two ranks, for tests: `torchrun` starts this with a folder and the names of runs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from mplug2_fast.training import Trainer, make_recipe
from tests.training.conftest import values_of

TWO = [
    {"data": "tests.training.data:Noise", "task": "captioning", "batch_size": 2},
    {"data": "tests.training.data:Noise", "task": "question_answering", "batch_size": 2},
]
RUNS = {
    "ddp": {"steps": 4},
    "fsdp": {"steps": 4, "strategy": "fsdp", "ema": 0.5},
    "mixed": {"steps": 4, "sources": TWO, "seed": 3, "save_every": 9},
    "long": {"steps": 300, "save_every": 7, "sources": TWO, "workers": 1, "ema": 0.9},
}


def launcher() -> list[str]:
    """The command that starts a module on two ranks of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    return [*command, "--rdzv-endpoint=localhost:0", "-m"]


def main(folder: Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    for name in names:
        Trainer(make_recipe(values_of(folder / name, **RUNS[name])), note=print).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
