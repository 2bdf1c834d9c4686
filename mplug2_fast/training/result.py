"""Writes the trained model as a directory, with a model card about the training."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mplug2_fast.checkpoint import save_pretrained


def write_result(trainer: Any, model: Any, folder: Path, scores: Mapping[str, float]) -> None:
    """Writes the model of a run. Replaces an existing folder once the new one is complete."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as parent:
        fresh = Path(parent) / folder.name
        vocabulary = Path(parent) / "vocab.txt"
        vocabulary.write_text("".join(f"{token}\n" for token in trainer.tokenizer.vocabulary()), encoding="utf-8")
        save_pretrained(model, fresh, vocab=vocabulary, card=_card(trainer, scores))
        shutil.rmtree(folder, ignore_errors=True)
        fresh.replace(folder)


def _card(trainer: Any, scores: Mapping[str, float]) -> str:
    recipe, state = trainer.recipe, trainer.state
    start = recipe.model.checkpoint or f"new weights of the size {recipe.model.preset}"
    lines = ["## Training", "", f"Started from {start}. {state.step} of {trainer.steps} steps, seed {recipe.seed}.", ""]
    lines += ["| source | tasks | samples | batch size |", "| --- | --- | ---: | ---: |"]
    for source, data in zip(recipe.sources, trainer.datasets, strict=True):
        lines.append(f"| {source.data} | {', '.join(source.tasks)} | {len(data):,} | {source.batch_size} |")
    if state.bad:
        lines += ["", f"{len(state.bad)} files could not be read and were replaced by others."]
    if scores and recipe.validation is not None:
        lines += ["", "## Scores", "", f"On {recipe.validation.data} {recipe.validation.split}".rstrip() + ":", ""]
        lines += ["| metric | value |", "| --- | ---: |"]
        lines += [f"| {name} | {value:.4g} |" for name, value in scores.items()]
    return "\n".join([*lines, "", "## Recipe", "", "```json", recipe.model_dump_json(indent=2), "```"])
