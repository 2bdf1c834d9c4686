"""A training run, from a recipe to a model. Read this file from top to bottom: it follows the order of the run."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mplug2_fast.errors import ConfigError, DataError, MPlug2Error
from mplug2_fast.models import FAMILIES
from mplug2_fast.tasks import load
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import lora, start
from mplug2_fast.training.data import Batch, Dataset, Step, StepDataset, iterate, open_dataset, schedule
from mplug2_fast.training.data import to_device as moved
from mplug2_fast.training.log import Log
from mplug2_fast.training.optimizer import make_optimizer, official_of_parameters, set_learning_rates
from mplug2_fast.training.recipe import Distillation, Queues, Recipe, Source, load_recipe
from mplug2_fast.training.result import write_result
from mplug2_fast.training.saves import OptimizerState, Saves, named_tensors, names_in, require_names
from mplug2_fast.training.scst import CiderReward
from mplug2_fast.training.state import State
from mplug2_fast.training.step import Part, TrainingStep
from mplug2_fast.training.validation import Validator
from mplug2_fast.training.world import World, checkpoint_activations

STOPPED = 143
"""Exit status of a run that was asked to stop and has saved."""


class Trainer:
    """Trains a model by a recipe. A run that was stopped or killed resumes from its last save.

    Args:
        recipe: a recipe, or the path of one.
        model, tokenizer: used instead of those in the recipe.
        datasets: used instead of the data of the recipe's sources, in their order.
        note: called with each message.

    Attributes:
        model, tokenizer, optimizer, state: of the run. steps: its number of steps.

    Raises:
        ConfigError, DataError, CheckpointError: the recipe, the data or the checkpoint cannot be used. Nothing has been
            written by then.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        *,
        model: nn.Module | None = None,
        tokenizer: Tokenizer | None = None,
        datasets: Sequence[Dataset] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        recipe = self.recipe
        self.world = World(recipe.device)
        self.folder = Path(recipe.out)
        self.state = State()
        self._tasks = {name: load(name) for name in recipe.tasks}
        self._asked_to_stop = self._stop = False
        self._log = Log(recipe, self.world, note)
        recipe.check_ranks(self.world.size)
        self.tokenizer = tokenizer or start.tokenizer_of(recipe.model)
        if model is None:
            torch.manual_seed(recipe.seed)
            tasks, words = list(self._tasks.values()), self.tokenizer.vocab_size
            model = start.new_model(recipe.model, tasks, words, self.world.device)
        self.model = model
        if tokenizer is None and self.tokenizer.vocab_size != self.model.config.text.vocab_size:
            raise ConfigError(
                f"the vocabulary has {self.tokenizer.vocab_size} tokens and the model has "
                f"{self.model.config.text.vocab_size}: put the vocab.txt that it was trained with beside the "
                "checkpoint, or name a vocabulary of that size"
            )
        self.datasets = list(datasets) if datasets is not None else self._open_data()
        self.steps = recipe.steps or self._steps_of_epochs()
        self._plan = schedule([source.share for source in recipe.sources], self.steps, recipe.seed)
        self._validator = Validator.of(recipe, self.model.config)

    # --- the model and the data

    def _open_data(self) -> list[Dataset]:
        sources = self.recipe.sources
        return [open_dataset(s, [self._tasks[name] for name in s.tasks], self.model.config) for s in sources]

    def _steps_of_epochs(self) -> int:
        first = self.recipe.sources[0]
        steps = math.ceil(self.recipe.epochs * len(self.datasets[0]) / first.batch_size)
        if self.recipe.sources_per_step == "one":
            total = sum(source.share for source in self.recipe.sources)
            steps = math.ceil(steps * total / first.share)
        if steps < 1:
            raise ConfigError("the run has no steps: set steps, or epochs above 0")
        return steps

    def prepare(self) -> None:
        """Adapters, frozen parameters, optimizer, wrappers. `train` does this; call it before `step`."""
        recipe, model = self.recipe, self.model.to(self.world.device).train()
        self.names = official_of_parameters(model)
        start.freeze(model, recipe.model)
        if recipe.lora is not None:
            lora.add(model, recipe.lora)
        if recipe.activation_checkpointing:
            checkpoint_activations(model)
        momentum = None if recipe.distillation is None else recipe.distillation.momentum
        if momentum is not None and not any(task.soft_targets for task in self._tasks.values()):
            raise ConfigError(f"distillation: {', '.join(self._tasks)} has no soft targets: leave it out")
        self._module = TrainingStep(model, momentum, self._states(model))
        used = [model.config.modules_for(self._tasks[t] for t in source.tasks) for source in recipe.sources]
        always = frozenset[str].union(*used) if recipe.sources_per_step == "all" else frozenset.intersection(*used)
        self._wrapped = self.world.spread(self._module, recipe.strategy, find_unused=always != model.module_names)
        self.optimizer = make_optimizer(model, self.names, recipe.optimizer)
        self._parameter_names = {parameter: name for name, parameter in model.named_parameters()}
        self._average: dict[str, Tensor] = {}
        if recipe.ema:
            self._average = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._reward = self._make_reward()
        self.saves = Saves(self.folder / "saves", recipe.keep, self.world, self._log.note)

    def _states(self, model: nn.Module) -> dict[str, nn.Module]:
        """Task -> its training state, for tasks that have one."""
        queues = self.recipe.queues
        if queues is None:
            return {}
        for source in self.recipe.sources:
            if queues.size % source.batch_size and "retrieval" in source.tasks:
                raise ConfigError(
                    f"queues.size {queues.size} is not a multiple of the batch_size {source.batch_size}: change one"
                )
        tasks = self._tasks.values()
        made = {task.name: task.training_state(model, queues.size, queues.momentum) for task in tasks}
        states = {name: state for name, state in made.items() if state is not None}
        if not states:
            raise ConfigError(f"queues: {', '.join(self._tasks)} has no queues: leave them out")
        return states

    def _make_reward(self) -> CiderReward | None:
        sources = [i for i, source in enumerate(self.recipe.sources) if source.objective == "scst"]
        if not sources:
            return None
        from mplug2_fast.evaluation import tokenize

        prompt, wording = self.model.config.generation.prompt, self.model.config.wording
        items = getattr(self.datasets[sources[0]], "items", None)
        if items is None:
            raise ConfigError("scst counts the words of all captions: use a JSON Lines file, or a dataset with `items`")
        references = [item.caption for item in items]
        return CiderReward(references, tokenize, lambda ids: wording.caption(self.tokenizer, ids, prompt))

    # --- the run

    def train(self) -> Path:
        """Train to the end. Returns the folder of the model. Rank 0 writes.

        Raises:
            MPlug2Error: too many unreadable files, or too many steps in a row without an update.
        """
        with self.world, self._signals(), contextlib.closing(self._log):
            self.prepare()
            self._resume()
            self._log.begin(self.state.step, self.steps, self.state.bad)
            batches = self._batches(self.state.step)
            while self.state.step < self.steps and not self._finished_early():
                self.step(next(batches))
                if self._stop:
                    self._save()
                    self._log.note(f"stopped after step {self.state.step}; rerun the same command to resume")
                    raise SystemExit(STOPPED)
                self._between_steps()
            return self._finish()

    def _resume(self) -> None:
        if self.world.first:
            self._log.claim()
        began = self.world.from_first(self._log.recorded_recipe() if self.world.first else None)
        if began is not None and (changed := self.recipe.differences(began)):
            raise ConfigError(
                f"{self.folder} was started with another {', '.join(changed)}: use the original values or another out"
            )
        if self.world.first:
            self._log.record_recipe()
        found = self.saves.newest()
        if found is None:
            return
        path, state = found
        stored = names_in(path)
        optimizer = OptimizerState(self.optimizer, self._parameter_names, stored)
        tensors = {**self._weights(), **optimizer.tensors}
        require_names(tensors, stored, path)
        self.saves.read(path, tensors)
        optimizer.apply()
        self.state = State(**state)
        self._log.note(f"resuming after step {self.state.step} of {self.steps}")

    def _batches(self, start: int) -> Iterator[dict[int, Step]]:
        """Source -> this rank's share, for each step from `start` on."""
        recipe, world = self.recipe, self.world
        counts = [start] * len(recipe.sources)
        totals = [self.steps] * len(recipe.sources)
        if recipe.sources_per_step == "one":
            counts = [int((self._plan[:start] == i).sum()) for i in range(len(recipe.sources))]
            totals = [int((self._plan == i).sum()) for i in range(len(recipe.sources))]
        iterators = []
        for i, source in enumerate(recipe.sources):
            steps = StepDataset(
                self.datasets[i],
                [self._tasks[name] for name in source.tasks],
                self.tokenizer,
                self.model.config,
                batch_size=source.batch_size,
                parts=recipe.accumulate,
                seed=(recipe.seed, i),
                rank=world.rank,
                world_size=world.size,
            )
            iterators.append(iterate(steps, counts[i], totals[i], recipe.workers))
        for step in itertools.count(start):
            chosen = range(len(iterators)) if recipe.sources_per_step == "all" else [int(self._plan[step])]
            yield {i: self._log.waiting(iterators[i]) for i in chosen}

    def step(self, shares: Mapping[int, Step]) -> dict[str, float]:
        """Make one update, after `prepare`. Takes this rank's share of each source's batch.

        Returns the loss of each task before the update, over all ranks.
        """
        recipe, state = self.recipe, self.state
        rate = set_learning_rates(self.optimizer, recipe.schedule, state.step, self.steps)
        self._module.update()
        self.optimizer.zero_grad(set_to_none=True)
        keys = [(i, task) for i in shares for task in self._names(recipe.sources[i])]
        counts = [sum(part.targets[task] for part in shares[i].parts) for i, task in keys]
        *totals, stop = self.world.sums([*counts, float(self._asked_to_stop)])
        self._stop = stop > 0
        targets = dict(zip(keys, totals, strict=True))
        losses: dict[str, float] = {}
        for number in range(recipe.accumulate):
            parts = [self._part(i, share.parts[number], targets) for i, share in shares.items()]
            torch.manual_seed(_seed(recipe.seed, state.step, self.world.rank, number))
            with self._synchronised(number == recipe.accumulate - 1):
                with self._precision():
                    total, found = self._wrapped(parts, self._alpha(), self._reward, self._queue_alpha())
                (total * self.world.size).backward()
            for name, loss in found.items():
                losses[name] = losses.get(name, 0.0) + float(loss)
        names = sorted(losses)
        losses = dict(zip(names, self.world.sums([losses[name] for name in names]), strict=True))
        norm = self._clip()
        loss = self._weighted(losses, shares)
        reason = state.reason_to_skip(loss, norm, recipe.max_spike)
        if reason is None:
            self.optimizer.step()
            if self._average:
                own = [p.detach() for p in self.model.parameters()]
                torch._foreach_lerp_(list(self._average.values()), own, 1 - recipe.ema)
        state.step += 1
        self._count(reason, shares)
        samples = sum(recipe.sources[i].batch_size for i in shares)
        self._log.step(state.step, loss, losses, norm=norm, rate=rate, samples=samples, skipped=reason)
        return losses

    def _names(self, source: Source) -> list[str]:
        """The names of a source's tasks, which are shorter than what the recipe says of tasks in files."""
        return [self._tasks[task].name for task in source.tasks]

    def _part(self, i: int, batch: Batch, targets: Mapping[tuple[int, str], float]) -> Part:
        source = self.recipe.sources[i]
        names = self._names(source)
        shares = {name: batch.targets[name] / max(targets[i, name], 1) for name in names}
        weights = dict(zip(names, source.weights, strict=True))
        tensors = {task: moved(each, self.world.device) for task, each in batch.tensors.items()}
        options = {name: source.options_of(task) for name, task in zip(names, source.tasks, strict=True)}
        return Part(batch._replace(tensors=tensors), shares, weights, source.objective, options)

    def _weighted(self, losses: Mapping[str, float], shares: Mapping[int, Step]) -> float:
        sources = [self.recipe.sources[i] for i in shares]
        weights = {name: w for source in sources for name, w in zip(self._names(source), source.weights, strict=True)}
        return sum(weights[name] * value for name, value in losses.items())

    def _alpha(self) -> float:
        return self._ramped(self.recipe.distillation)

    def _queue_alpha(self) -> float:
        return self._ramped(self.recipe.queues)

    def _ramped(self, settings: Distillation | Queues | None) -> float:
        if settings is None:
            return 0.0
        ramp = settings.ramp_steps
        return settings.alpha * (min(1.0, self.state.step / ramp) if ramp else 1.0)

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients are exchanged with the last part only."""
        if isinstance(self._wrapped, nn.parallel.DistributedDataParallel):
            with contextlib.nullcontext() if last else self._wrapped.no_sync():
                yield
            return
        if hasattr(self._wrapped, "set_requires_gradient_sync"):
            self._wrapped.set_requires_gradient_sync(last)
        yield

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.autocast == "none":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    def _clip(self) -> float:
        """Clip the gradients. Returns their norm before."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        limit = self.recipe.optimizer.gradient_clip or math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _count(self, reason: str | None, shares: Mapping[int, Step]) -> None:
        state = self.state
        state.skipped += reason is not None
        state.skipped_in_row = state.skipped_in_row + 1 if reason is not None else 0
        if state.skipped_in_row > self.recipe.max_skipped:
            raise MPlug2Error(
                f"{state.skipped_in_row} steps in a row were skipped, the last because {reason}: lower the learning "
                f"rate and go back to a save in {self.saves.folder}"
            )
        for share in shares.values():
            for path, why in share.bad.items():
                if path not in state.bad:
                    self._log.note(f"skipped an unreadable file: {path}: {why}")
                state.bad[path] = why

    def _between_steps(self) -> None:
        recipe, step = self.recipe, self.state.step
        if step % recipe.log_every == 0:
            self._share_bad_files()
        validation = recipe.validation
        if self._validator and validation and validation.every and step % validation.every == 0 and step < self.steps:
            self._validate(validation.max_items)
        if step % recipe.save_every == 0 and step < self.steps:
            self._save()

    def _share_bad_files(self) -> None:
        state = self.state
        for other in self.world.gathered(state.bad):
            state.bad |= other
        files = sum(len(data) for data in self.datasets)
        if len(state.bad) > max(1, self.recipe.max_bad * files):
            path, why = next(iter(state.bad.items()))
            raise DataError(
                f"{len(state.bad)} of {files} files cannot be read, more than max_bad {self.recipe.max_bad:g}; first "
                f"{path}: {why}. `mplug2-fast data check` finds them all"
            )

    def _finished_early(self) -> bool:
        validation = self.recipe.validation
        return bool(validation and validation.patience and self.state.worse >= validation.patience)

    def _validate(self, max_items: int) -> None:
        """Score the model, and keep it if it is the best so far."""
        scores = None
        with self._written_weights() as model:
            if self.world.first and self._validator:
                scores = self._validator.scores(model, self.tokenizer, self.world.device, max_items)
                value = scores[self._validator.metric]
                if self.state.best is None or value > self.state.best:
                    write_result(self, model, self.folder / "best", scores)
        self._record(self.world.from_first(scores))

    def _record(self, scores: dict[str, float] | None) -> None:
        if scores is None or self._validator is None:
            return
        state, value = self.state, scores[self._validator.metric]
        state.scores.append((state.step, scores))
        better = state.best is None or value > state.best
        state.worse = 0 if better else state.worse + 1
        if better:
            state.best, state.best_step = value, state.step
        self._log.scores(state.step, scores)

    def _finish(self) -> Path:
        self._share_bad_files()
        folder, scores = self.folder / "model", None
        with self._written_weights() as model:
            if self.world.first:
                if self._validator:
                    scores = self._validator.report(model, self.tokenizer, self.folder / "evaluation")
                    self._log.note(f"{self.folder / 'evaluation'}: the report of the evaluation")
                write_result(self, model, folder, scores or {})
        self._record(self.world.from_first(scores))
        self._save()
        self._log.end(self.state)
        return folder

    @contextlib.contextmanager
    def _written_weights(self) -> Iterator[nn.Module]:
        """The model that is written and validated: whole, with the average of the weights and merged adapters. On other
        ranks than the first, it has no meaning."""
        sharded = hasattr(self._wrapped, "unshard")
        if not (sharded or self._average or self.recipe.lora):
            try:
                yield self.model.eval()
            finally:
                self.model.train()
            return
        tensors = self._average or {name: p.detach() for name, p in self.model.named_parameters()}
        whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
        if not self.world.first:
            yield self.model
            return
        config, tasks = self.model.config, list(self._tasks.values())
        plain = FAMILIES[config.family].build(config, tasks, self.world.device, next(iter(whole.values())).dtype)
        if self.recipe.lora is not None:
            whole = lora.merged(whole, self.recipe.lora)
        plain.load_state_dict(whole)
        yield plain.eval()

    def _weights(self) -> dict[str, Tensor]:
        """The weights of the model, of their average, and of the teacher, and the tasks' states, by name."""
        tensors = named_tensors("model", self.model)
        tensors |= {f"average.{name}": tensor for name, tensor in self._average.items()}
        if self._module.teacher is not None:
            tensors |= named_tensors("teacher", self._module.teacher)
        tensors |= named_tensors("state", self._module.states)
        return tensors

    def _save(self) -> None:
        optimizer = OptimizerState(self.optimizer, self._parameter_names)
        self.saves.write(self.state.step, {**self._weights(), **optimizer.tensors}, vars(self.state))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run after the current step, with a save. A second one ends it at once."""

        def stop(number: int, _: Any) -> None:
            if self._asked_to_stop:
                raise KeyboardInterrupt
            self._asked_to_stop = True

        try:
            before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
