"""Train a proof, score it on held-out samples, and write the result.

Run as `python -m examples.proofs NAME` from the repository root. `python -m examples.proofs table` prints all results.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import torch
import typer

import mplug2_fast as mf
from examples.proofs.rows import FOLDER, ROWS, table
from mplug2_fast.tasks import Task
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import Sample, load_recipe
from mplug2_fast.training.data import video_of


def accuracy(model: Any, task: Task, tokenizer: Tokenizer, samples: list[Sample], batch_size: int = 50) -> float:
    """The share of samples whose best result is right."""
    respond, right = task.respond(model, tokenizer), 0
    for start in range(0, len(samples), batch_size):
        some = samples[start : start + batch_size]
        with torch.inference_mode():
            video = video_of(some, model.config.vision.image_size)
            found = respond(task.encode(model, video), [task.text_of(each.item, model.config) for each in some])
        for each, texts in zip(some, found, strict=True):
            right += texts[0].text in task.references(each.item)
    return right / len(samples)


def main(
    name: Annotated[str, typer.Argument(help=f"table, or one of {', '.join(ROWS)}.")],
    changes: Annotated[list[str] | None, typer.Argument(help="Changes of the recipe, as key=value.")] = None,
) -> None:
    """Train a proof, score it, and write results/NAME.json."""
    if name == "table":
        typer.echo(table())
        return
    if name not in ROWS:
        raise typer.BadParameter(f"no proof {name!r}: choose table or one of {', '.join(ROWS)}")
    row = ROWS[name]
    recipe = load_recipe(FOLDER / row.recipe, [f"out=build/proofs/{name}", *(changes or [])])
    trainer = mf.Trainer(recipe)
    started = time.process_time()
    trainer.train()
    minutes = (time.process_time() - started) / 60
    (task,) = trainer.model.tasks.values()
    found = accuracy(trainer.model.eval(), task, trainer.tokenizer, row.held_out(trainer.model.config))
    result = {"accuracy": found, "seed": recipe.seed, "steps": trainer.steps, "cpu_minutes": round(minutes, 2)}
    if row.peers is not None:
        result["peers"] = row.peers()
    (FOLDER / "results" / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    typer.echo(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
