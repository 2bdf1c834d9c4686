"""Recipes: everything that decides a training run, checked before anything is loaded."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from mplug2_fast.errors import ConfigError, printable

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
except ImportError as error:
    raise ImportError("training needs further packages: pip install 'mplug2-fast[train]'") from error

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(_Part):
    """What is trained."""

    checkpoint: str = ""
    """A checkpoint to start from: a path, or `owner/name` on the Hugging Face Hub."""
    new_heads: bool = False
    """Whether heads of tasks that the checkpoint lacks start from new weights. Otherwise they are an error."""
    preset: str = ""
    """Instead of a checkpoint: the size of a model with new weights."""
    family: str = "mplug2"
    init: Literal["bert", "scaled"] = "bert"
    """New weights: `bert` is the official rule, for large models; `scaled` preserves the scale of inputs."""
    vocabulary: str = ""
    """A vocab.txt for a preset; empty is that of bert-base-uncased. For a checkpoint, one as large as its own, whose
    unused entries may be new words."""
    config: dict[str, Any] = {}
    """Changes of the configuration, such as `{num_frames = 8}`."""
    train_only: list[str] = []
    """Patterns of official parameter names, such as `*lmhra*`. Other parameters are frozen. Empty: all are trained."""
    freeze: list[str] = []
    """Patterns of official parameter names that are not trained."""

    @model_validator(mode="after")
    def _one_start(self) -> Model:
        if bool(self.checkpoint) == bool(self.preset):
            raise ValueError("give either checkpoint or preset")
        return self


class Lora(_Part):
    """Low-rank adapters by peft, merged when the model is written."""

    rank: Positive = 8
    alpha: Rate = 16.0
    dropout: Share = 0.0
    targets: list[str] = ["*.c_fc.weight", "*.c_proj.weight", "*.dense.weight"]
    """Patterns of official names: weights of linear layers, and of queries, keys and values."""


class Source(_Part):
    """Data for one task, or for several tasks that share the encoded videos."""

    data: str
    """A JSON Lines file, a folder of splits, or `module:Name` or `file.py:Name` of a dataset in Python."""
    task: str | list[str]
    split: str = ""
    batch_size: Positive = 8
    """Samples of a step, on all ranks together."""
    share: Annotated[float, Field(gt=0)] = 1.0
    """How often a step takes this source, if a step takes one."""
    weight: float | list[float] = 1.0
    """Of the loss, or of each task's."""
    augment: Literal[
        "none", "video", "image", "randaugment", "randaugment_corrected", "grounding", "grounding_corrected"
    ] = "none"
    """`none`: only the frames of videos are random, as mPLUG-2's official fine-tuning does. `video` and `image` are for
    mPLUG-2. The others are for images with mPLUG: see `PICTURE_AUGMENTATIONS`."""
    objective: Literal["loss", "scst"] = "loss"
    options: dict[str, Any] = {}
    """Options of the task's loss, such as `{weighting = "per_sample"}`. With several tasks, each task's are named:
    `{grounding = {weighting = "per_sample"}}`."""

    @property
    def tasks(self) -> list[str]:
        return [self.task] if isinstance(self.task, str) else self.task

    @property
    def weights(self) -> list[float]:
        return self.weight if isinstance(self.weight, list) else [self.weight] * len(self.tasks)

    def options_of(self, task: str) -> dict[str, Any]:
        return self.options if len(self.tasks) == 1 else self.options.get(task, {})

    @model_validator(mode="after")
    def _complete(self) -> Source:
        if not self.tasks:
            raise ValueError("task is an empty list: name at least one")
        if len(self.weights) != len(self.tasks):
            raise ValueError(f"weight has {len(self.weights)} numbers and task {len(self.tasks)} names")
        if len(self.tasks) > 1 and (other := sorted(self.options.keys() - {*self.tasks})):
            raise ValueError(f"options has {', '.join(other)}, which is no task of this source")
        if self.objective == "scst" and self.tasks != ["captioning"]:
            raise ValueError("scst trains the task captioning")
        return self


class Optimizer(_Part):
    """AdamW with two learning rates. Defaults are the official fine-tuning's."""

    learning_rate: Rate = 2e-5
    vision_learning_rate: Rate | None = 2e-6
    """Of the vision encoder. None: as `learning_rate`."""
    weight_decay: Rate = 0.02
    decay: Literal["official", "matrices"] = "official"
    """Parameters that decay. `official`: all but biases and `LayerNorm.weight`, so CLIP's norms decay. `matrices`:
    those with at least two dimensions."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Rate = 1e-8
    gradient_clip: Rate = 1.0
    """Largest norm of all gradients together; 0 does not clip."""

    @model_validator(mode="before")
    @classmethod
    def _pair(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            return {**values, "betas": tuple(values["betas"])}
        return values


class Schedule(_Part):
    """Linear warm-up, then a cosine that ends with the last step."""

    warmup_steps: Count = 200
    warmup_learning_rate: Rate = 0.0
    """Rate at which the warm-up starts."""
    min_learning_rate: Rate = 1e-6
    """Rate at which the cosine ends. A base rate below it stays constant."""
    kind: Literal["cosine", "constant", "epochs"] = "cosine"
    """`epochs` is mPLUG's: in the first epoch the rate goes in stairs of 100 steps from the warm-up's start to the base
    rate, up or down. Then it is constant within each epoch, on a cosine over the epochs."""
    steps_per_epoch: Count = 0
    """Of the schedule `epochs`."""

    @model_validator(mode="after")
    def _with_epochs(self) -> Schedule:
        if (self.kind == "epochs") != bool(self.steps_per_epoch):
            raise ValueError("steps_per_epoch goes with the schedule epochs, which needs it")
        return self


class Distillation(_Part):
    """Soft targets from a momentum copy of the model, over the vocabulary.

    The official code makes the copy but its weight never reaches the decoder, so official models train without it.
    """

    alpha: Share = 0.4
    momentum: Share = 0.995
    ramp_steps: Count = 0
    """Steps over which alpha grows from 0."""


class Queues(_Part):
    """Momentum features of earlier batches that retrieval contrasts with. Defaults are the official ones.

    Without this part, a batch is contrasted within itself.
    """

    size: Positive = 65536
    """A multiple of the batch."""
    momentum: Share = 0.995
    alpha: Share = 0.4
    """Weight of the momentum copy's own similarities among the targets."""
    ramp_steps: Count = 0
    """Steps over which alpha grows from 0; the official code takes the first epoch."""


class Validation(_Part):
    """Scores on held-out data during training."""

    data: str
    task: str
    split: str = ""
    every: Count = 0
    """Steps between validations; 0 validates only at the end."""
    metric: str = ""
    """Decides what is best. Empty: the task's main metric."""
    patience: Count = 0
    """Validations without an improvement before training stops; 0 never stops."""
    max_items: Count = 0
    """Items that are scored during training; 0 means all. The last validation scores all."""
    options: dict[str, Any] = {}
    """Options of the task, such as `{num_beams = 3}`."""


class Recipe(_Part):
    """A training run.

    Raises `ConfigError` for an unknown key, with the nearest name, and for a value that makes no sense.
    """

    out: str
    """Folder for saves, logs and the trained model. An interrupted run resumes there."""
    model: Model
    sources: Annotated[list[Source], Field(min_length=1)]
    sources_per_step: Literal["one", "all"] = "one"
    steps: Count = 0
    epochs: Rate = 10.0
    """Passes over the first source, if `steps` is 0."""
    accumulate: Positive = 1
    """Parts in which a rank computes its share of a batch, to save memory."""
    seed: Count = 0
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    lora: Lora | None = None
    distillation: Distillation | None = None
    queues: Queues | None = None
    validation: Validation | None = None
    ema: Share = 0.0
    """Decay of an average of the weights, which is validated and written; 0 keeps none."""
    autocast: Literal["none", "bfloat16"] = "none"
    activation_checkpointing: bool = False
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Across several ranks."""
    device: str = "auto"
    workers: Count = 2
    """Processes that decode, per rank and source; 0 decodes in the training process."""
    max_bad: Share = 0.01
    """Share of a source's files that may be unreadable."""
    max_spike: Rate = 10.0
    """A step is skipped if its loss is this many standard deviations, at least 0.1 each, above the recent mean; 0 skips
    none."""
    max_skipped: Positive = 20
    """Steps in a row that may be skipped before training stops."""
    save_every: Positive = 500
    keep: Positive = 3
    """Saves that are kept, the latest ones."""
    log_every: Positive = 10
    tensorboard: bool = True
    wandb: bool = False

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks, in the order of the sources."""
        return list(dict.fromkeys(task for source in self.sources for task in source.tasks))

    def check_ranks(self, size: int) -> None:
        """Raise `ConfigError` unless this many ranks can share the run."""
        for source in self.sources:
            if source.batch_size % (size * self.accumulate):
                raise ConfigError(
                    f"batch_size {source.batch_size} of {source.data} must be a multiple of the number of ranks times "
                    f"accumulate, {size} · {self.accumulate}"
                )
        if self.distillation and size > 1 and self.strategy == "fsdp":
            raise ConfigError("distillation keeps a whole copy of the model: use the strategy ddp")

    def differences(self, other: Recipe) -> list[str]:
        """Names of the fields that decide the weights and differ, dotted."""
        mine, theirs = _flat(self.model_dump()), _flat(other.model_dump())
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return [name for name in names if name.split(".")[0] not in _FREE]


_FREE = frozenset(("out", "device", "workers", "save_every", "keep", "log_every", "tensorboard", "wandb", "validation"))
"""Fields that may change when a run resumes. The batches of a step do not depend on them."""
_FREE |= {"strategy", "accumulate", "max_bad", "max_skipped"}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a TOML file, with `key=value` changes, such as `schedule.warmup_steps=0` or `sources.0.split=a`.

    Paths of data and checkpoints in the file are relative to the file.

    Raises:
        ConfigError: the file cannot be read, or is no recipe. Names the file, the key and the remedy.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for override in overrides:
        _set(values, override)
    try:
        return _resolved(make_recipe(values), path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from nested plain values. Raises `ConfigError`."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_message(each) for each in error.errors())) from None


def _message(error: Any) -> str:
    *where, last = error["loc"] or ("recipe",)
    name = ".".join(str(part) for part in (*where, last))
    if error["type"] == "extra_forbidden":
        names = list(_part_at(where).model_fields)
        near = difflib.get_close_matches(str(last), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(names)}"
        return f"unknown key {printable(name)}: {hint}"
    if error["type"] == "missing":
        return f"{name} is missing"
    given = "" if isinstance(error["input"], dict) else f", got {printable(repr(error['input']), 80)}"
    return f"{name}: {error['msg'].removeprefix('Value error, ')}{given}"


def _part_at(where: Sequence[Any]) -> type[BaseModel]:
    parts: dict[str, type[BaseModel]] = {
        "model": Model,
        "lora": Lora,
        "sources": Source,
        "optimizer": Optimizer,
        "schedule": Schedule,
        "distillation": Distillation,
        "queues": Queues,
        "validation": Validation,
    }
    return parts[str(where[0])] if where else Recipe


def _set(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{printable(override)!r} is not of the form key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *where, last = name.strip().split(".")
    here: Any = values
    try:
        for part in where:
            here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
        here[int(last) if isinstance(here, list) else last] = value
    except (IndexError, ValueError, TypeError, AttributeError):
        raise ConfigError(f"{printable(name)}: there is no such place in the recipe") from None


def _resolved(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with paths that do not depend on the working directory."""

    def at(path: str) -> str:
        if not path or Path(path).is_absolute() or (":" in path and not path.endswith((".jsonl", ".json"))):
            return path
        beside = os.path.normpath(folder / path)
        return beside if os.path.exists(beside) or not os.path.exists(path) else path

    sources = [source.model_copy(update={"data": at(source.data)}) for source in recipe.sources]
    start = recipe.model.checkpoint
    checkpoint = at(start) if (folder / start).exists() else start
    model = recipe.model.model_copy(update={"checkpoint": checkpoint, "vocabulary": at(recipe.model.vocabulary)})
    changed: dict[str, Any] = {"sources": sources, "model": model}
    if recipe.validation is not None:
        changed["validation"] = recipe.validation.model_copy(update={"data": at(recipe.validation.data)})
    return recipe.model_copy(update=changed)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list):
            value = {str(index): each for index, each in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
