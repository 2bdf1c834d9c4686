"""The output of a run: lines, a progress bar, a log file, TensorBoard, a plot."""

from __future__ import annotations

import fcntl
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mplug2_fast.errors import ConfigError
from mplug2_fast.training.recipe import Recipe, make_recipe
from mplug2_fast.training.world import World

_T = TypeVar("_T")

RECIPE, LOG, PLOT = "recipe.json", "log.jsonl", "loss.png"


class Log:
    """The log of a run. Only the first rank writes it.

    Args:
        recipe: of the run. world: its ranks. note: called with each message. None prints messages on standard error.
    """

    def __init__(self, recipe: Recipe, world: World, note: Callable[[str], None] | None) -> None:
        self._recipe, self._first = recipe, world.first
        self._folder = Path(recipe.out)
        self._print = note
        self._waited, self._samples = 0.0, 0
        self._from, self._steps, self._started = 0, 0, time.monotonic()
        self._file: Any = None
        self._open: list[Any] = []
        self._bar: Any = None
        self._writers: list[Callable[[int, Mapping[str, float]], None]] = []

    def note(self, line: str) -> None:
        """Show a message to the user."""
        if not self._first:
            return
        if self._print is not None:
            self._print(line)
        elif self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def claim(self) -> None:
        """Keep other runs out of the folder while this process lives.

        Raises:
            ConfigError: another run is there.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = (self._folder / ".lock").open("a")
        self._open.append(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self._folder}: another run is training there: stop it, or use another out") from None

    def recorded_recipe(self) -> Recipe | None:
        """The recipe that started this run; None for a new run."""
        path = self._folder / RECIPE
        if not path.exists():
            return None
        try:
            return make_recipe(json.loads(path.read_text()))
        except ValueError as error:
            raise ConfigError(f"{path}: is damaged ({error}): restore it, or use another out") from error

    def record_recipe(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{RECIPE}.partial"
        partial.write_text(self._recipe.model_dump_json(indent=2))
        partial.replace(self._folder / RECIPE)

    def begin(self, step: int, steps: int, bad: Mapping[str, str]) -> None:
        """Start after a step. Drops the lines of later steps, which will be repeated."""
        self._steps, self._started, self._from = steps, time.monotonic(), step
        self._samples = 0
        if not self._first:
            return
        path = self._folder / LOG
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(path)
        self._file = path.open("a", buffering=1)
        self._open.append(self._file)
        self._open_writers(step)
        if sys.stderr.isatty() and self._print is None:
            self._bar = _bar()
            self._task = self._bar.add_task("", total=steps, completed=step, text="")
            self._bar.start()
        self.note(f"training: steps {step + 1} to {steps}, {len(bad)} unreadable files so far" if step else
                  f"training: {steps} steps")  # fmt: skip

    def _open_writers(self, step: int) -> None:
        if self._recipe.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.note("note: no TensorBoard logs: pip install tensorboard, or set tensorboard=false")
            else:
                writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1)
                self._writers.append(
                    lambda step, values: [writer.add_scalar(name, v, step) for name, v in values.items()]
                )
                self._open.append(writer)
        if self._recipe.wandb:
            try:
                import wandb
            except ImportError as error:
                raise ConfigError("wandb=true needs the package: pip install wandb") from error
            run = wandb.init(project="mplug2_fast", id=self._folder.name, resume="allow", dir=str(self._folder))
            self._writers.append(lambda step, values: run.log(dict(values), step=step))

    def waiting(self, iterator: Iterator[_T]) -> _T:
        """Return the iterator's next value. The time counts as waiting for data."""
        started = time.monotonic()
        value = next(iterator)
        self._waited += time.monotonic() - started
        return value

    def step(
        self,
        step: int,
        loss: float,
        losses: Mapping[str, float],
        *,
        norm: float,
        rate: float,
        samples: int,
        skipped: str | None,
    ) -> None:
        """Record a step."""
        self._samples += samples
        if self._file is None:
            return
        values = {"loss": loss, **{f"loss/{name}": value for name, value in losses.items()}}
        values |= {"gradient_norm": norm, "learning_rate": rate}
        line = {"step": step, **values, **({"skipped": skipped} if skipped else {})}
        self._file.write(json.dumps(line) + "\n")
        for write in self._writers:
            write(step, values)
        if skipped:
            self.note(f"step {step}: skipped: {skipped}")
        seconds = max(time.monotonic() - self._started, 1e-9)
        left = seconds / (step - self._from) * (self._steps - step)
        parts = ", ".join(f"{name} {value:.3f}" for name, value in losses.items()) if len(losses) > 1 else ""
        text = (
            f"loss {loss:.4f}{f' ({parts})' if parts else ''}, rate {rate:.2g}, "
            f"{self._samples / seconds:.1f} samples/s, {self._waited / seconds:.0%} waiting for data, "
            f"{_duration(left)} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif step % self._recipe.log_every == 0 or step == self._steps:
            self.note(f"step {step}/{self._steps}: {text}")

    def scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Record the scores of a validation."""
        if not self._first:
            return
        for write in self._writers:
            write(step, {f"validation/{name}": value for name, value in scores.items()})
        self.note(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    def end(self, state: Any) -> None:
        """Plot the losses and report how the run went."""
        if not self._first:
            return
        self._plot(state)
        problems = f"; {state.skipped} steps skipped" if state.skipped else ""
        problems += f"; {len(state.bad)} files could not be read" if state.bad else ""
        self.note(f"{self._folder / 'model'}: trained for {state.step} steps{problems}")

    def close(self) -> None:
        """Close all files. Call this however the run ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for each in self._open:
            each.close()

    def _plot(self, state: Any) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            self.note("note: no plot of the losses: pip install matplotlib")
            return
        lines = [json.loads(line) for line in (self._folder / LOG).read_text().splitlines()]
        figure = Figure(figsize=(8, 4))
        axes = figure.subplots()
        for name in (name for name in lines[0] if name.startswith("loss")) if lines else ():
            axes.plot([line["step"] for line in lines], [line.get(name) for line in lines], label=name, lw=1)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        if state.scores:
            other = axes.twinx()
            name = next(iter(state.scores[0][1]))
            other.plot([s for s, _ in state.scores], [values[name] for _, values in state.scores], "k.-")
            other.set_ylabel(name)
        axes.legend()
        figure.savefig(self._folder / PLOT, dpi=120)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    return Progress(*columns, console=Console(stderr=True))


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"
