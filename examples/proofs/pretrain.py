"""Pre-training with all losses in each step, then fine-tuning, beside the same fine-tuning from scratch.

Run as `python -m examples.proofs.pretrain` from the repository root. It pre-trains by pretrain.toml. Then it trains
captions and retrieval of frames by frames.toml, with a tenth of its steps, from the pre-trained model and from new
weights, with several seeds each. It writes results/pretrain.json. `python -m examples.proofs.pretrain --show` prints
the tables.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import mplug2_fast as mf
from examples.proofs import universal, unseen
from examples.proofs.unseen import FOLDER
from mplug2_fast.training import load_recipe
from mplug2_fast.training.data import video_of

RESULTS = FOLDER / "results/pretrain.json"
FINE_TUNING = FOLDER / "frames.toml"
SHARE = 10
"""Fine-tuning takes the steps of its recipe divided by this."""
SEEDS = (0, 1, 2)
"""Of fine-tuning. Pre-training has one."""
WINDOW = 50
"""Steps whose mean loss is reported."""
BATCH = 50
TITLES = {
    "retrieval": "contrast and matching, frames",
    "fused_mlm": "masked words beside frames",
    "prefix_lm": "prefix language modelling, videos",
    "mlm": "masked words, texts",
    "text_prefix_lm": "prefix language modelling, texts",
}


def losses(log: Path) -> dict[str, dict[str, float]]:
    """The mean loss of each task over the first and the last steps of a log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    found = {}
    for task in TITLES:
        values = [line[f"loss/{task}"] for line in lines if f"loss/{task}" in line]
        found[task] = {"first": float(np.mean(values[:WINDOW])), "last": float(np.mean(values[-WINDOW:]))}
    return found


@torch.inference_mode()
def contrast_and_matching(model: Any, trainer: mf.Trainer) -> dict[str, float]:
    """Both losses of retrieval on held-out frames, apart, with the options of the recipe."""
    torch.manual_seed(0)
    task, samples, found = model.tasks["retrieval"], unseen.held_out(model.config), []
    options = trainer.recipe.sources[0].options_of(task.name)
    for start in range(0, len(samples), BATCH):
        some = samples[start : start + BATCH]
        batch = task.batch([sample.item for sample in some], trainer.tokenizer, model.config)
        batch["video"] = video_of(some, model.config.vision.image_size)
        parts = task.losses(model, batch, **options)
        found.append([float(parts.contrast), float(parts.matching)])
    return dict(zip(("contrast", "matching"), np.mean(found, axis=0).tolist(), strict=True))


def tuned(folder: Path, start: Path | None, seed: int, changes: Sequence[str] = ()) -> tuple[int, dict[str, float]]:
    """Train for captions and retrieval from a model, or from new weights. Returns the steps and the scores."""
    steps = load_recipe(FINE_TUNING).steps // SHARE
    own = [f"out={folder}_{seed}", f"steps={steps}", f"seed={seed}", "tensorboard=false"]
    if start is not None:
        own.append(f'model={{checkpoint="{start.resolve()}", config={{vision={{num_frames=1}}}}}}')
    trainer = mf.Trainer(load_recipe(FINE_TUNING, [*own, *changes]))
    return trainer.steps, universal.score(mf.from_pretrained(trainer.train()), trainer.tokenizer)


def run(pretraining: Sequence[str] = (), tuning: Sequence[str] = ()) -> dict[str, Any]:
    """Pre-train, fine-tune, and train from scratch, with changes of both recipes."""
    trainer = mf.Trainer(load_recipe(FOLDER / "pretrain.toml", ["tensorboard=false", *pretraining]))
    held_out = {"first": contrast_and_matching(trainer.model.eval(), trainer)}
    start = trainer.train()
    held_out["last"] = contrast_and_matching(mf.from_pretrained(start), trainer)
    result: dict[str, Any] = {"losses": losses(trainer.folder / "log.jsonl"), "held_out": held_out}
    result |= {"seed": trainer.recipe.seed, "steps": trainer.steps}
    for name, checkpoint in (("pretrained", start), ("from_scratch", None)):
        result[name] = {}
        for seed in SEEDS:
            found = tuned(trainer.folder / name, checkpoint, seed, tuning)
            result["fine_tuning_steps"], result[name][str(seed)] = found
    return result


def tables() -> str:
    """The committed results in Markdown."""
    result = json.loads(RESULTS.read_text())
    lines = [f"| loss | first {WINDOW} steps | last {WINDOW} steps |", "| --- | ---: | ---: |"]
    for task, each in result["losses"].items():
        lines.append(f"| {TITLES[task]} | {each['first']:.2f} | {each['last']:.2f} |")
    for name in ("contrast", "matching"):
        first, last = (result["held_out"][when][name] for when in ("first", "last"))
        lines.append(f"| {name}, held-out frames, before and after | {first:.2f} | {last:.2f} |")
    scores = {key: title for key, title in universal.SCORES.items() if key != "gap"}
    lines += ["", f"| {result['fine_tuning_steps']:,} steps | {' | '.join(scores.values())} |"]
    lines.append(f"| --- |{' ---: |' * len(scores)}")
    for name, title in (("pretrained", "from the pre-trained model"), ("from_scratch", "from new weights")):
        lines.append(f"| {title} | {' | '.join(universal.figures(result[name].values(), scores))} |")
    return "\n".join(lines)


def main(show: Annotated[bool, typer.Option(help="Print the committed tables.")] = False) -> None:
    """Pre-train, fine-tune, compare, and write results/pretrain.json."""
    if show:
        typer.echo(tables())
        return
    result = run()
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    typer.echo(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
