"""The command `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mplug2_fast.cli.console import emit, reporting
from mplug2_fast.errors import ConfigError


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe: see docs/training.md.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as steps=500 seed=1."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the recipe, the data and the model, and stop.")] = False,
    ray: Annotated[
        int | None, typer.Option("--ray", metavar="N", min=1, help="Train on a Ray cluster, with N workers.")
    ] = None,
) -> None:
    """Train a model on your own data. Run the same command again to resume a run that was stopped."""
    with reporting():
        try:
            from mplug2_fast.training import Trainer, load_recipe
        except ImportError as error:
            raise ConfigError(str(error)) from error
        loaded = load_recipe(recipe, changes or [])
        if ray and check:
            loaded.check_ranks(ray)
        elif ray:
            from mplug2_fast.ray import train as train_on_ray

            emit(str(train_on_ray(loaded, ray)))
            return
        trainer = Trainer(loaded, note=None)
        if check:
            sizes = ", ".join(f"{len(data):,}" for data in trainer.datasets)
            emit(f"{recipe}: right; {trainer.steps:,} steps, samples of each source: {sizes}")
        else:
            emit(str(trainer.train()))
