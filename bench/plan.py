"""What to measure at the level of the model, and which worker processes that takes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import mplug2_fast as mf
from bench import flops, inputs
from bench.flops import MPLUG_TASKS, STEPS, TASKS
from bench.implementations import build
from bench.row import EIGHT_BIT, Key
from mplug2_fast.models import FAMILIES as MODELS

BASELINES = ("reference", "eager", "compiled")
FAMILIES = {
    "captioning": ("captioning", "features", "vision", "universal", "decode"),
    "answering": ("answering", "ranking", "grounding"),
    "retrieval": ("retrieval features", "re-ranking", "re-ranking long texts"),
    "captioning step": ("captioning step", "captioning step checkpointed", "data loader"),
    "answering step": ("answering step", "answering step checkpointed"),
}
"""Tasks that share a process, because they need the same model in the same state."""
LOADER = "data loader"
TRAIN = (*STEPS, LOADER)
"""The tasks of the level `train`. A checkpointed step computes the activations of each layer a second time."""
DECODING = ("captioning", "answering", "decode")
QUESTION_TOKENS = 10
TEXT_TOKENS = 30
"""To which mPLUG pads or cuts texts that are compared with an image."""
COMPARED = {
    "texts": inputs.lengths(17, 128, 9),
    "long_texts": inputs.lengths(TEXT_TOKENS, 128, TEXT_TOKENS),
    "candidates": inputs.lengths(5, 128, 3),
}
"""Tokens of 128 captions, about as long as those of COCO and Flickr30k, of 128 long texts, and of 128 answers, with
[SEP]."""
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, **dict.fromkeys(EIGHT_BIT, 1)}


@dataclass(frozen=True)
class Spec:
    """What a worker holds: an implementation of a family of tasks, its sizes, and the folder for inputs and results."""

    implementation: str
    dtype: str
    device: str
    threads: int
    config: Any
    beams: int
    steps: int
    exchange: str
    family: str = "captioning"

    @property
    def label(self) -> str:
        return f"{self.implementation} {self.dtype}"


@dataclass(frozen=True)
class Plan:
    """A run of the benchmark at the level of the model.

    Attributes:
        model: a family of models.
        tasks: from `bench.flops.MODEL_TASKS` of the model and `TRAIN`, in the order of the rows.
        threads: of each worker, on the CPU.
        baselines: from `BASELINES`. The reference always runs, because the others are compared with it.
        reference_steps: decoding steps of the reference, at most `steps`.
        freeze: whether the compiled peer freezes and packs its weights, on a CPU and not in training.
        compiled_tasks: tasks for which the peer is compiled. Compiling takes most of a quick run.
        accelerate: whether to measure the accelerated reference instead of the fast model.
    """

    preset: str
    dtypes: tuple[str, ...]
    device: str
    tasks: tuple[str, ...]
    frames: int
    beams: int
    steps: int
    batch: int
    repeats: int
    threads: int
    reference_steps: int
    baselines: tuple[str, ...] = BASELINES
    freeze: bool = True
    compiled_tasks: tuple[str, ...] = (*dict.fromkeys((*TASKS, *MPLUG_TASKS)), *TRAIN)
    quick: bool = False
    accelerate: bool = False
    video: Path | None = None
    model: str = "mplug2"

    @property
    def config(self) -> Any:
        return MODELS[self.model].config.preset(self.preset)

    @property
    def runs_a_turn(self) -> int:
        """Consecutive runs whose median counts. The tiny model's first run mostly pays for what another process left in
        the caches."""
        return 5 if self.preset == "tiny" else 1

    @property
    def sizes(self) -> str:
        """The sizes of a row."""
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        frames = f"{self.frames} frames" if self.frames > 1 or self.model == "mplug2" else "1 image"
        family = "" if self.model == "mplug2" else f"{MODELS[self.model].title} "
        return f"{family}{self.preset}, {frames}, {self.beams} beams, {self.steps} steps{batch}"

    def key(self, task: str, dtype: str) -> Key:
        name = f"{task}, accelerated" if self.accelerate else task
        level, sizes = "model", self.sizes
        if task in TRAIN:
            level, sizes = "train", sizes.replace(f"{self.beams} beams, ", "").replace("steps", "targets")
        direction = "both" if task in STEPS else "forward"
        return Key(level, name, sizes, direction, dtype, self.device.split(":")[0])

    def reference_decodes_less(self, task: str) -> bool:
        """Whether the reference takes fewer decoding steps. Its time is then a lower bound, and its results differ."""
        return task in DECODING and self.reference_steps < self.steps

    def needed_flop(self, task: str) -> int:
        return 0 if task == LOADER else flops.needed(task, self.config, **self._counted(), **COMPARED)

    def recomputed_flop(self, task: str) -> int | None:
        return flops.recomputed(task, self.config, **self._counted()) if task.endswith("checkpointed") else None

    def tokens(self, task: str) -> int | None:
        """Those of video and text that a training step computes."""
        if task not in STEPS:
            return None
        text = QUESTION_TOKENS if task.startswith("answering") else self.config.generation.prompt_tokens
        return self.batch * (flops.visual_tokens(self.config, self.frames) + text + self.steps)

    def needed_bytes(self, task: str, dtype: str) -> int:
        if task == LOADER:
            return 0
        return flops.needed_bytes(task, self.config, ELEMENT_BYTES[dtype], **self._counted(), **COMPARED)

    def _counted(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in ("frames", "beams", "steps", "batch")}
        return {**sizes, "question": QUESTION_TOKENS}

    def command(self, task: str, dtype: str) -> str:
        """The command that measures a row again."""
        words = []
        words += ["--accelerate"] if self.accelerate else ["--level", "train" if task in TRAIN else "model"]
        words += [] if self.model == "mplug2" else ["--model", self.model]
        beside = [wide for wide in self.dtypes if wide not in EIGHT_BIT] if dtype in EIGHT_BIT else []
        words += ["--only", task, "--preset", self.preset, "--dtype", ",".join([*beside, dtype])]
        words += self.size_options()
        if self.reference_steps < self.steps:
            words += ["--reference-steps", str(self.reference_steps)]
        if not self.accelerate:
            words += ["--baselines", ",".join(name for name in self.baselines if self.runs(name, task))]
            words += [] if self.freeze else ["--no-freeze"]
        return self.command_of(words)

    def size_options(self) -> list[str]:
        names = ("device", "frames", "beams", "steps", "batch", "repeats", "threads")
        return [word for name in names for word in (f"--{name}", str(getattr(self, name)))]

    def command_of(self, words: list[str]) -> str:
        video = ["--video", self.video.name] if self.video else []
        return shlex.join(["python", "bench/run.py", *words, *video])

    def save_video(self, exchange: Path) -> str:
        """Writes the video for the workers. Returns a description of it."""
        video, description = inputs.load(self.video, self.frames, self.config.vision.image_size)
        torch.save(video.expand(self.batch, *video.shape).contiguous(), exchange / "video.pt")
        return description

    def runs(self, baseline: str, task: str) -> bool:
        """Whether a task has this baseline. The accelerated reference is compared with the plain one."""
        if self.accelerate:
            return baseline == "reference"
        if task == LOADER:
            return False
        return baseline in self.baselines and (baseline != "compiled" or task in self.compiled_tasks)

    def tasks_of(self, implementation: str, family: str) -> tuple[str, ...]:
        """The tasks of a worker."""
        baseline = self.baseline(implementation)
        wanted = [task for task in self.tasks if task in FAMILIES[family]]
        steps = [task for task in wanted if task != LOADER]
        return tuple(
            wanted
            if baseline is None
            else steps
            if baseline == "reference"
            else [task for task in steps if self.runs(baseline, task)]
        )

    @staticmethod
    def baseline(implementation: str) -> str | None:
        """The baseline that an implementation is in a row; None for ours."""
        names = {"fast": None, "accelerated": None, "frozen": "compiled"}
        return names.get(implementation, implementation)

    def groups(self, available: int) -> list[tuple[str, tuple[str, ...]]]:
        """(family, dtypes) of the workers that are alive together: all dtypes if they fit into `available` bytes,
        otherwise one after another. Each group has its own reference, so that compared runs take turns."""
        groups = []
        for family in (family for family in FAMILIES if self.tasks_of("fast", family)):
            if not self.tasks_of("reference", family):
                continue
            together = self.device != "cpu" or self.resident_bytes(family, self.dtypes) < 0.9 * available
            groups += [(family, dtypes) for dtypes in ([self.dtypes] if together else [(d,) for d in self.dtypes])]
        return groups

    def resident_bytes(self, family: str, dtypes: tuple[str, ...]) -> int:
        """An estimate of what the workers of a group take while the reference computes."""
        parameters = _parameters(self.config, family)
        tokens, text, vision = flops.visual_tokens(self.config, self.frames), self.config.text, self.config.vision
        total = 6 * self.batch * text.num_attention_heads * tokens**2 * 4  # scores
        if family in STEPS:
            # Gradients, and about 40 values per channel and token that each block keeps for the backward pass.
            total += 4 * parameters + 4 * 40 * self.batch * tokens * vision.width * vision.layers
        for spec in self.specs(family, dtypes, ""):
            total += 700 << 20  # libraries; in the peer also the compiler
            if family in STEPS:
                total += 3 * 4 * parameters  # with both moments of the optimizer
            else:
                copies = {"fast": 1.5, "accelerated": 1.5, "frozen": 2}.get(spec.implementation, 1)
                total += int(copies * ELEMENT_BYTES[spec.dtype] * parameters)
        return total

    def specs(self, family: str, dtypes: tuple[str, ...], exchange: str) -> Iterator[Spec]:
        """The workers of a group, the reference first."""
        sizes = (self.device, self.threads, self.config, self.beams, self.reference_steps, exchange, family)
        reference = Spec("reference", "float32", *sizes)
        yield reference
        freeze = self.freeze and self.device == "cpu" and family not in STEPS
        kinds = ["accelerated" if self.accelerate else "fast", "eager", "frozen" if freeze else "compiled"]
        for dtype in dtypes:
            for kind in kinds[:1] if dtype in EIGHT_BIT else kinds:
                if self.tasks_of(kind, family):
                    yield replace(reference, implementation=kind, dtype=dtype, steps=self.steps)


@cache
def _parameters(config: Any, family: str) -> int:
    """The number of parameters of a family's model."""
    return sum(p.numel() for p in build(mf, config, family, device="meta").parameters())
