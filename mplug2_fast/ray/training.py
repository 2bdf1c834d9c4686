"""Training on a Ray cluster. Ray Train starts the ranks and restarts them; each rank runs the usual `Trainer`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mplug2_fast.errors import ConfigError, MPlug2Error

if TYPE_CHECKING:
    from mplug2_fast.training import Recipe


def train(recipe: Recipe | str | Path, num_workers: int, *, restarts: int = 3) -> Path:
    """Train by a recipe on a Ray cluster.

    Connects to the cluster that `ray.init()` finds, or starts one on this machine. A run that was stopped resumes from
    its last save. The saves are those of `Trainer`; Ray stores no checkpoints.

    Args:
        recipe: a recipe, or the path of one. The working directory, the data and `out` have the same paths on all
            machines.
        num_workers: number of ranks. Each has a GPU if the cluster has GPUs and the recipe's device is not "cpu".
        restarts: how often all ranks start again after one of them failed.

    Returns the folder of the model.

    Raises:
        ConfigError: Ray is missing, the cluster is too small, or this number of ranks cannot train by the recipe.
        MPlug2Error: training failed more than `restarts` times. States the last error.
    """
    from mplug2_fast.training import load_recipe
    from mplug2_fast.training.world import TIMEOUT, backend_of

    recipe = load_recipe(recipe) if isinstance(recipe, (str, Path)) else recipe
    recipe.check_ranks(num_workers)
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise ConfigError(f"Ray Train cannot be imported ({error}): pip install 'mplug2-fast[ray,train]'") from error
    if not ray.is_initialized():
        ray.init()
    resources = ray.cluster_resources()
    gpus = recipe.device != "cpu" and "GPU" in resources
    kind = "GPU" if gpus else "CPU"
    if (there := int(resources.get(kind, 0))) < num_workers:
        raise ConfigError(f"{num_workers} workers need one {kind} each, and the cluster has {there}: use fewer workers")
    trainer = TorchTrainer(
        _train_rank,
        train_loop_config={"recipe": recipe, "folder": os.getcwd()},
        torch_config=TorchConfig(backend_of("cuda" if gpus else "cpu"), timeout_s=int(TIMEOUT.total_seconds())),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=gpus),
        run_config=RunConfig(
            storage_path=str(Path(recipe.out, "ray").absolute()), failure_config=FailureConfig(max_failures=restarts)
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise MPlug2Error(f"training on Ray failed: {_cause(error)}") from error
    return Path(recipe.out, "model")


def _train_rank(settings: dict[str, Any]) -> None:
    from mplug2_fast.training import Trainer

    os.chdir(settings["folder"])  # Ray has its own
    Trainer(settings["recipe"]).train()


def _cause(error: Exception) -> Exception:
    """The failure of a rank that explains the others. A rank that lost its peers fails with a RuntimeError of torch."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    return min(failures, key=lambda failure: isinstance(failure, RuntimeError))
