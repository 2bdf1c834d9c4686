"""Models with different numbers of universal layers, trained alike: what they learn, and the modality gap.

Run as `python -m examples.proofs.universal` from the repository root. It trains 15 models by universal.toml and writes
results/universal.json. The vision encoders start from that of the tiny model, as mPLUG-2's start from CLIP's. The rest
starts from new weights. `python -m examples.proofs.universal --show` prints the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

import mplug2_fast as mf
from examples.proofs.finding import features, frames_first
from examples.proofs.unseen import CAPTIONS, FOLDER, held_out
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import load_recipe
from mplug2_fast.training.data import video_of

TINY = Path(mf.__file__).parent / "data/tiny"
RESULTS = FOLDER / "results/universal.json"
SEEDS = (0, 1, 2)


class Variant(NamedTuple):
    """A model of the ablation: its title, and its changes of the configuration of texts."""

    title: str
    text: str


VARIANTS = {
    "0": Variant("0: no universal layers, text has 1 layer", "num_uni_layer=0, text_encoder_layers=1"),
    "0_unshared": Variant("0: 2 layers each for text and video", "num_uni_layer=2, share_universal=false"),
    "1": Variant("1 of 3 text layers shared", "num_uni_layer=1"),
    "2": Variant("2 of 3 shared", "num_uni_layer=2"),
    "3": Variant("3 of 3 shared", "num_uni_layer=3"),
}
SCORES = {
    "captions": "captions",
    "captions_by_frames": "captions by frames",
    "frames_by_captions": "frames by captions",
    "gap": "modality gap",
}


@torch.inference_mode()
def score(model: Any, tokenizer: Tokenizer) -> dict[str, float]:
    """Shares of captions, and recall at 1 among 48, on held-out frames; and ‖mean u - mean w‖ of the features."""
    samples = held_out(model.config)
    visual, text, right = features(model, tokenizer, samples)
    similarities = visual @ text.T
    respond, exact = model.tasks["captioning"].respond(model, tokenizer, num_beams=1), 0
    for start in range(0, len(samples), 100):
        some = samples[start : start + 100]
        found = respond(model.encode_video(video_of(some, model.config.vision.image_size)), [None] * len(some))
        exact += sum(texts[0].text == each.item.caption[0] for each, texts in zip(some, found, strict=True))
    return {
        "captions": exact / len(samples),
        "captions_by_frames": float((similarities.argmax(dim=1) == right).float().mean()),
        "frames_by_captions": frames_first(similarities, right, list(range(len(CAPTIONS)))),
        "gap": float((visual.mean(dim=0) - text[right].mean(dim=0)).norm()),
    }


def trainer_of(name: str, seed: int, changes: Sequence[str] = ()) -> mf.Trainer:
    """The run of one model, with further changes of the recipe, before it starts."""
    own = [f"out=build/proofs/universal/{name}_{seed}", f"seed={seed}", "tensorboard=false"]
    own.append(f"model.config.text={{text_decode_layers=3, {VARIANTS[name].text}}}")
    trainer = mf.Trainer(load_recipe(FOLDER / "universal.toml", [*own, *changes]))
    start = mf.from_pretrained(TINY, task="captioning", pack=False).official_parameters()
    for parameter, weight in trainer.model.official_parameters().items():
        if parameter.startswith("visual_encoder."):
            weight.copy_(start[parameter])
    return trainer


def figures(models: Iterable[dict[str, float]], keys: Iterable[str]) -> list[str]:
    """Mean and spread (half of the range) of scores over models that differ in their seeds."""
    models, texts = list(models), []
    for key in keys:
        found = np.array([each[key] for each in models])
        mean, spread = found.mean(), (found.max() - found.min()) / 2
        texts.append(f"{mean:.2f} ± {spread:.2f}" if key == "gap" else f"{mean:.1%} ± {100 * spread:.1f}")
    return texts


def table() -> str:
    """The committed results in Markdown."""
    result = json.loads(RESULTS.read_text())
    lines = [f"| universal layers | {' | '.join(SCORES.values())} |", f"| --- |{' ---: |' * len(SCORES)}"]
    for name, variant in VARIANTS.items():
        lines.append(f"| {variant.title} | {' | '.join(figures(result['models'][name].values(), SCORES))} |")
    return "\n".join(lines)


def main(
    show: Annotated[bool, typer.Option(help="Print the committed table.")] = False,
    results: Annotated[Path, typer.Option(help="File to write. Runs that it has are not repeated.")] = RESULTS,
) -> None:
    """Train all models, and write their scores after each."""
    if show:
        typer.echo(table())
        return
    result = json.loads(results.read_text()) if results.exists() else {"models": {}}
    for seed in SEEDS:
        for name in VARIANTS:
            models = result["models"].setdefault(name, {})
            if str(seed) not in models:
                trainer = trainer_of(name, seed)
                models[str(seed)] = score(mf.from_pretrained(trainer.train()), trainer.tokenizer)
                results.write_text(json.dumps(result, indent=2) + "\n")
                typer.echo(f"{name} {seed}: {json.dumps(models[str(seed)])}")


if __name__ == "__main__":
    typer.run(main)
