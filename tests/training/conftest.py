from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from mplug2_fast.training import Recipe, Trainer, make_recipe
from mplug2_fast.training.log import Log

VOCABULARY = Path(__file__).parents[2] / "mplug2_fast" / "data" / "tiny" / "vocab.txt"
SMALL = {
    "vision": {"width": 64, "layers": 1},
    "text": {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "num_latents": 5,
        "text_encoder_layers": 2,
        "stored_layers": 1,
        "fusion_layers": 1,
    },
}


@pytest.fixture(autouse=True)
def _no_debug_lines():
    """torch.distributed.checkpoint writes two for each tensor, which pytest would keep."""
    for name, logger in logging.root.manager.loggerDict.items():
        if "dcp_logger" in name and isinstance(logger, logging.Logger):
            logger.setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def _no_plots(request, monkeypatch):
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(Log, "_plot", lambda *_: None)


@pytest.fixture
def plots():
    """Runs of this test draw their losses."""


def values_of(out: Path, **changes: Any) -> dict[str, Any]:
    """The values of a recipe: six steps of a small model, with changes of the top level."""
    return {
        "out": str(out),
        "model": {"preset": "tiny", "vocabulary": str(VOCABULARY), "config": SMALL, "init": "scaled"},
        "sources": [{"data": "tests.training.data:Noise", "task": "captioning", "batch_size": 4}],
        "steps": 6,
        "workers": 0,
        "save_every": 2,
        "tensorboard": False,
        "optimizer": {"learning_rate": 1e-3, "vision_learning_rate": 5e-4},
        "schedule": {"warmup_steps": 3},
        **changes,
    }


@pytest.fixture
def recipe(tmp_path):
    """A function from changes of the top level to a recipe."""

    def make(**changes: Any) -> Recipe:
        return make_recipe({**values_of(tmp_path / "run"), **changes})

    return make


@pytest.fixture
def train():
    """Train by a recipe. Returns the trainer and the lines for people."""

    def run(recipe: Recipe, **options) -> tuple[Trainer, list[str]]:
        lines: list[str] = []
        trainer = Trainer(recipe, note=lines.append, **options)
        trainer.train()
        return trainer, lines

    return run
