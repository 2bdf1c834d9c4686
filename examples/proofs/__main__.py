"""Train a proof, score it on held-out samples, and write the result.

Run as `python -m examples.proofs NAME` from the repository root. `python -m examples.proofs table` prints all results.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
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
            found = respond(encoded(model, task, some), [task.text_of(each.item, model.config) for each in some])
        for each, texts in zip(some, found, strict=True):
            right += texts[0].text in task.references(each.item)
    return right / len(samples)


def encoded(model: Any, task: Task, samples: list[Sample]) -> torch.Tensor | None:
    """The visual tokens of samples, as `respond` takes them. The frames of two images are those of a video of two."""
    if not task.reads_files:
        return None
    video = video_of(samples, model.config.vision.image_size)
    if task.num_files == 1:
        return task.encode(model, video)
    return torch.stack([task.encode(model, image) for image in video.chunk(task.num_files, dim=2)], dim=1)


def trained(
    name: str, changes: Sequence[str], *, local_temporal: bool = True
) -> tuple[list[mf.Trainer], float, dict[str, float]]:
    """Train by the recipe of a proof, if wanted without local temporal modules, and by the one after it if it has one.

    Returns the finished runs, the accuracy on held-out samples of the model that it wrote, and further scores.
    """
    folder = f"build/proofs/{name}" if local_temporal else f"build/proofs/{name}_without_local_temporal"
    frozen = [] if local_temporal else ["model.freeze=['*lmhra*']"]
    trainer = mf.Trainer(load_recipe(FOLDER / f"{name}.toml", [f"out={folder}", *frozen, *changes]))
    if ROWS[name].start is not None:
        ROWS[name].start(trainer.model)
    if not local_temporal:
        for parameter, weight in trainer.model.official_parameters().items():
            if ".up_proj." in parameter:  # The module then adds zero to its input.
                weight.detach().zero_()
    path, runs, score = trainer.train(), [trainer], ROWS[name].score
    if ROWS[name].then:
        runs.append(mf.Trainer(load_recipe(FOLDER / f"{ROWS[name].then}.toml")))
        path = runs[-1].train()
    model = mf.from_pretrained(path)
    if score is not None:
        return runs, *score(model, trainer.tokenizer)
    task = next(iter(model.tasks.values()))  # A model that answers questions also ranks answers.
    return runs, accuracy(model, task, trainer.tokenizer, ROWS[name].held_out(model.config)), {}


@contextlib.contextmanager
def cpu_minutes(file: Path) -> Iterator[list[float]]:
    """Measures CPU minutes, added to those in the file: a run that was stopped resumes, and all of its parts count."""
    minutes = [float(file.read_text()) if file.exists() else 0.0]
    started = time.process_time()
    try:
        yield minutes
    finally:
        minutes[0] += (time.process_time() - started) / 60
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{minutes[0]}\n")


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
    with cpu_minutes(Path(f"build/proofs/{name}/cpu_minutes")) as minutes:
        runs, found, peers = trained(name, changes or [])
    seed, steps = runs[0].recipe.seed, sum(run.steps for run in runs)
    result: dict[str, Any] = {"accuracy": found, "seed": seed, "steps": steps, "cpu_minutes": round(minutes[0], 2)}
    if row.peers is not None:
        peers |= row.peers()
    if row.moves:
        _, peers["without_local_temporal_modules"], _ = trained(name, changes or [], local_temporal=False)
    if peers:
        result["peers"] = peers
    (FOLDER / "results" / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    typer.echo(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
