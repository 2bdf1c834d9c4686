"""What is to be measured at the level of the model, and which worker processes are needed for it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from bench import flops
from bench.flops import TASKS
from bench.row import Key
from bench.workers import Spec
from mplug2_fast import MPlug2Config
from mplug2_fast.models.mplug2 import MPlug2ForCaptioning, MPlug2ForQuestionAnswering

BASELINES = ("reference", "eager", "compiled")
# Tasks that share a process, for they need the same model in the same state.
FAMILIES = {
    "captioning": ("captioning", "features", "vision", "universal", "decode"),
    "answering": ("answering",),
    "training": ("training",),
}
DECODING = ("captioning", "answering", "decode")
QUESTION_TOKENS = 10
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Plan:
    """A run of the benchmark.

    Attributes:
        tasks: of `TASKS`, in the order of the rows.
        threads: of every worker, on the CPU.
        baselines: of `BASELINES`. The reference runs in any case: the others are compared with it.
        reference_steps: decoding steps that the reference is timed at; `steps`, or fewer.
        freeze: whether the compiled peer's weights are frozen and packed, on a CPU and not in training.
        compiled_tasks: of the tasks, those that the peer is compiled for, which takes most of a quick run.
        accelerate: whether the reference, accelerated in place, takes the fast model's place.
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
    compiled_tasks: tuple[str, ...] = TASKS
    quick: bool = False
    accelerate: bool = False
    video: Path | None = None

    @property
    def config(self) -> MPlug2Config:
        return MPlug2Config.preset(self.preset)

    @property
    def runs_a_turn(self) -> int:
        """In a row, of which the median counts: the tiny model's first one is mostly about what another process left in
        the caches."""
        return 5 if self.preset == "tiny" else 1

    @property
    def sizes(self) -> str:
        """Of a row's work."""
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.preset}, {self.frames} frames, {self.beams} beams, {self.steps} steps{batch}"

    def key(self, task: str, dtype: str) -> Key:
        name = f"{task}, accelerated" if self.accelerate else task
        direction = "both" if task == "training" else "forward"
        return Key("model", name, self.sizes, direction, dtype, self.device.split(":")[0])

    def reference_decodes_less(self, task: str) -> bool:
        """Whether the reference is timed at fewer decoding steps than the others: then it can be no faster than that,
        and its results are others."""
        return task in DECODING and self.reference_steps < self.steps

    def needed_flop(self, task: str) -> int:
        return flops.needed(task, self.config, **self._counted())

    def needed_bytes(self, task: str, dtype: str) -> int:
        return flops.needed_bytes(task, self.config, ELEMENT_BYTES[dtype], **self._counted())

    def _counted(self) -> dict[str, int]:
        sizes = {name: getattr(self, name) for name in ("frames", "beams", "steps", "batch")}
        return {**sizes, "question": QUESTION_TOKENS}

    def command(self, task: str, dtype: str) -> str:
        """The command that measures a row again."""
        words = ["python", "bench/run.py"]
        words += ["--accelerate"] if self.accelerate else ["--level", "model"]
        words += ["--only", task, "--preset", self.preset, "--dtype", dtype]
        for option in ("device", "frames", "beams", "steps", "batch", "repeats", "threads"):
            words += [f"--{option}", str(getattr(self, option))]
        if self.reference_steps < self.steps:
            words += ["--reference-steps", str(self.reference_steps)]
        if not self.accelerate:
            words += ["--baselines", ",".join(name for name in self.baselines if self.runs(name, task))]
            words += [] if self.freeze else ["--no-freeze"]
        return shlex.join(words + (["--video", self.video.name] if self.video else []))

    def runs(self, baseline: str, task: str) -> bool:
        """Whether a task has this baseline. The reference, accelerated, is compared with what it was."""
        if self.accelerate:
            return baseline == "reference"
        return baseline in self.baselines and (baseline != "compiled" or task in self.compiled_tasks)

    def tasks_of(self, implementation: str, family: str) -> tuple[str, ...]:
        """What a worker is asked for."""
        baseline = self.baseline(implementation)
        wanted = [task for task in self.tasks if task in FAMILIES[family]]
        return tuple(task for task in wanted if baseline in (None, "reference") or self.runs(baseline, task))

    @staticmethod
    def baseline(implementation: str) -> str | None:
        """What an implementation is called in a row; None is ours."""
        names = {"fast": None, "accelerated": None, "frozen": "compiled"}
        return names.get(implementation, implementation)

    def groups(self, available: int) -> list[tuple[str, tuple[str, ...]]]:
        """(family, dtypes) of the workers that are alive together: all dtypes if `available` bytes allow, otherwise one
        after another. A group has a reference of its own, so that what is compared is measured side by side."""
        groups = []
        for family in (family for family in FAMILIES if self.tasks_of("fast", family)):
            together = self.device != "cpu" or self.resident_bytes(family, self.dtypes) < 0.9 * available
            groups += [(family, dtypes) for dtypes in ([self.dtypes] if together else [(d,) for d in self.dtypes])]
        return groups

    def resident_bytes(self, family: str, dtypes: tuple[str, ...]) -> int:
        """About what the workers of a group take together, while the reference computes."""
        parameters = _parameters(self.config, family)
        tokens, text, vision = flops.visual_tokens(self.config, self.frames), self.config.text, self.config.vision
        total = 6 * self.batch * text.num_attention_heads * tokens**2 * 4  # scores
        if family == "training":
            # Gradients, and about 40 values a channel and token that every block keeps for the backward pass.
            total += 4 * parameters + 4 * 40 * self.batch * tokens * vision.width * vision.layers
        for spec in self.specs(family, dtypes, ""):
            total += 700 << 20  # libraries, and the compiler's in the peer
            if family == "training":
                total += 3 * 4 * parameters  # with both moments of the optimizer
            else:
                copies = {"fast": 1.5, "accelerated": 1.5, "frozen": 2}.get(spec.implementation, 1)
                total += int(copies * ELEMENT_BYTES[spec.dtype] * parameters)
        return total

    def specs(self, family: str, dtypes: tuple[str, ...], exchange: str) -> Iterator[Spec]:
        """The workers of a group, the reference first."""
        config = self.config.to_dict()
        sizes = (self.device, self.threads, config, self.beams, self.reference_steps, exchange, family)
        reference = Spec("reference", "float32", *sizes)
        yield reference
        freeze = self.freeze and self.device == "cpu" and family != "training"
        kinds = ["accelerated" if self.accelerate else "fast", "eager", "frozen" if freeze else "compiled"]
        for dtype in dtypes:
            for kind in kinds:
                if self.tasks_of(kind, family):
                    yield replace(reference, implementation=kind, dtype=dtype, steps=self.steps)


@cache
def _parameters(config: MPlug2Config, family: str) -> int:
    """How many the model of a family has."""
    kind = MPlug2ForQuestionAnswering if family == "answering" else MPlug2ForCaptioning
    return sum(p.numel() for p in kind(config, device="meta").parameters())
