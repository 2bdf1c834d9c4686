"""One recipe with every loss of pre-training and tasks of one's own, from a checkpoint that lacks their heads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mplug2_fast as mf
from mplug2_fast.predict.predictor import TINY_MODEL

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("av")
pytest.importorskip("pydantic")

TASK = (
    'from mplug2_fast.tasks import Classification\n\nsame = Classification(["false", "true"], "two_images", "same")\n'
)
SOURCES = [("texts", ["mlm", "text_prefix_lm", "text_generation"]), ("pairs", "same.py:same")]
SOURCES += [("images", ["fused_mlm", "prefix_lm", "captioning"]), ("images", "retrieval")]


def test_one_step_over_all_of_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    text = "the red star moves left"
    lines = {
        "texts": [{"text": text, "answer": "red"}],
        "pairs": [{"images": ["0.png", f"{number}.png"], "text": text, "label": number == 0} for number in (0, 1)],
        "images": [{"image": f"{number}.png", "caption": text} for number in (0, 1)],
    }
    for name, items in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in items))
    (tmp_path / "same.py").write_text(TASK)
    sources = {
        "texts": ["mlm", "text_prefix_lm", "text_generation"],
        "pairs": f"{tmp_path}/same.py:same",
        "images": ["fused_mlm", "prefix_lm", "captioning", "retrieval"],
    }
    recipe = mf.training.recipe.make_recipe(
        {
            "out": str(tmp_path / "run"),
            "steps": 2,
            "workers": 0,
            "device": "cpu",
            "sources_per_step": "all",
            "model": {"checkpoint": str(TINY_MODEL), "new_heads": True},
            "sources": [
                {"data": f"{tmp_path}/{name}.jsonl", "task": task, "batch_size": 2} for name, task in sources.items()
            ],
        }
    )
    saved = mf.Trainer(recipe).train()
    losses = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    names = ["mlm", "text_prefix_lm", "text_generation", "same", "fused_mlm", "prefix_lm", "captioning", "retrieval"]
    assert {name for name in losses if name.startswith("loss/")} == {f"loss/{name}" for name in names}
    assert sum(losses[f"loss/{name}"] for name in names) == pytest.approx(losses["loss"], rel=1e-5)
    loaded = mf.from_pretrained(saved)
    assert set(loaded.tasks) == set(names)
