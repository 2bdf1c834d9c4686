"""Saves, from which a run resumes. They are written atomically, sharded over the ranks, and checked when read."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from mplug2_fast.errors import CheckpointError
from mplug2_fast.evaluation.run import sha256_of
from mplug2_fast.training.world import World

STATE, MANIFEST = "state.json", "manifest.json"
_AVERAGES = ("exp_avg", "exp_avg_sq")
_NAME = re.compile(r"step-(\d+)")


class Saves:
    """The saves of a run, in folders `step-N`. Each holds torch.distributed.checkpoint's files, and two of JSON.

    Args:
        folder: the folder of all saves.
        keep: the number of saves to keep.
        world: the ranks. Every rank must make every call.
        note: called with a message if a save failed or is damaged.
    """

    def __init__(self, folder: Path, keep: int, world: World, note: Callable[[str], None]) -> None:
        self.folder, self._keep, self._world, self._note = folder, keep, world, note

    def steps(self) -> list[int]:
        """The steps that have a save, in ascending order."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def write(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> bool:
        """Writes a save. If the disk is full or cannot be written, notes why, keeps older saves, and returns False.

        Args:
            step: number of steps done. tensors: by name. state: JSON values.
        """
        final = self.folder / f"step-{step}"
        partial = self.folder / f".step-{step}.partial"
        problem = self._on_first(lambda: _empty(partial))
        if problem is None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that there is no process group
                    dcp.save(dict(tensors), checkpoint_id=partial)
            except (OSError, CheckpointException, RuntimeError) as error:
                problem = _reason(error)
            problem = next((each for each in self._world.gathered(problem) if each), None)
        if problem is None:
            problem = self._on_first(lambda: self._finish(partial, final, state))
        if problem is not None and self._world.first:
            shutil.rmtree(partial, ignore_errors=True)
            kept = self.steps()
            left = f"the save of step {kept[-1]} stays" if kept else "there is no older save"
            self._note(f"{final}: cannot be saved: {problem}; {left}")
        self._world.barrier()
        return problem is None

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The latest undamaged save and its state. Notes later ones that are damaged."""
        found = self._world.from_first(self._newest() if self._world.first else None)
        return None if found is None else (self.folder / found[0], found[1])

    def read(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Fills the tensors from a save, which any number of ranks may have written."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, checkpoint_id=path)

    def _newest(self) -> tuple[str, dict[str, Any]] | None:
        for step in reversed(self.steps()):
            path = self.folder / f"step-{step}"
            try:
                return path.name, _checked(path)
            except (OSError, ValueError, KeyError) as error:
                self._note(f"{path}: damaged: {_reason(error)}; going back to the save before")
        return None

    def _finish(self, partial: Path, final: Path, state: Mapping[str, Any]) -> None:
        (partial / STATE).write_text(json.dumps(state, indent=1))
        digests = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(digests, indent=1))
        for path in (*partial.iterdir(), partial):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        _sync(self.folder)
        for step in self.steps()[: -self._keep]:
            shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)

    def _on_first(self, action: Callable[[], None]) -> str | None:
        """Runs on the first rank. Returns why it failed there, on all ranks."""
        problem = None
        if self._world.first:
            try:
                action()
            except OSError as error:
                problem = _reason(error)
        return self._world.from_first(problem)


def names_in(path: Path) -> set[str]:
    """Names of the tensors in a save."""
    return set(FileSystemReader(path).read_metadata().state_dict_metadata)


def named_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, with a prefix."""
    return {
        f"{prefix}.{name}": tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


class OptimizerState:
    """The state of AdamW as tensors by name, to be saved or filled. The step counts are one tensor.

    Args:
        optimizer: its state. names: of the parameters.
        stored: names of the tensors of a save that is to be read; None takes what the optimizer has.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], stored: set[str] | None = None
    ) -> None:
        self._optimizer = optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.tensors: dict[str, Tensor] = {}
        steps = []
        for parameter in self._parameters:
            state, name = optimizer.state.get(parameter, {}), names[parameter]
            steps.append(float(state.get("step", 0)))
            for key in _AVERAGES:
                if stored is None and state:
                    self.tensors[f"optimizer.{name}.{key}"] = state[key]
                elif stored is not None and f"optimizer.{name}.{key}" in stored:
                    self.tensors[f"optimizer.{name}.{key}"] = torch.zeros_like(parameter)
        self.tensors["optimizer.steps"] = torch.tensor(steps, dtype=torch.float64)
        self._names = names

    def apply(self) -> None:
        """Gives the tensors to the optimizer."""
        for parameter, step in zip(self._parameters, self.tensors["optimizer.steps"].tolist(), strict=True):
            if step:
                averages = {key: self.tensors[f"optimizer.{self._names[parameter]}.{key}"] for key in _AVERAGES}
                count = torch.tensor(step, dtype=torch.float32, device=parameter.device)
                self._optimizer.state[parameter] = {"step": count, **averages}


def require_names(tensors: Mapping[str, Tensor], stored: set[str], path: Path) -> None:
    """Raises `CheckpointError` unless a save has exactly these tensors."""
    differing = sorted(tensors.keys() ^ stored)
    if differing:
        raise CheckpointError(
            f"{path}: {len(differing)} tensors of the save and of the recipe's model differ, first {differing[0]}: "
            "use the recipe that started this run, or another out"
        )


def _checked(path: Path) -> dict[str, Any]:
    digests = json.loads((path / MANIFEST).read_text())
    for name, digest in digests.items():
        if sha256_of(path / name) != digest:
            raise ValueError(f"{name} has changed since it was written")
    return json.loads((path / STATE).read_text())


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[-1]
