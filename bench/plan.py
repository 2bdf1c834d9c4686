"""What is to be measured, and which worker processes are needed for it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench import flops
from bench.workers import Spec
from mplug2_fast import MPlug2Config
from mplug2_fast.model import MPlug2ForCaptioning

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Plan:
    """A run of the benchmark.

    Attributes:
        peer: `"frozen"`, `"compiled"`, `"uncompiled"`, or None to leave the peer out.
        threads: of every worker, on the CPU.
        reference_steps: decoding steps that the reference is timed at; `steps`, or fewer.
        accelerate: whether the reference, accelerated in place, takes the fast model's place.
    """

    preset: str
    dtypes: tuple[str, ...]
    device: str
    levels: tuple[str, ...]
    frames: int
    beams: int
    steps: int
    batch: int
    repeats: int
    threads: int
    peer: str | None
    reference_steps: int
    quick: bool = False
    accelerate: bool = False
    video: Path | None = None

    @property
    def config(self) -> MPlug2Config:
        return MPlug2Config.preset(self.preset)

    def decodes_less(self, implementation: str, level: str) -> bool:
        """Whether the implementation is timed at fewer decoding steps than the others."""
        return implementation == "reference" and level in ("decode", "captioning") and self.reference_steps < self.steps

    def name(self, implementation: str, level: str) -> str:
        """The sizes of a row's work."""
        steps = f"{self.reference_steps} of {self.steps}" if self.decodes_less(implementation, level) else self.steps
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.preset}, {self.frames} frames, {self.beams} beams, {steps} steps{batch}"

    def needed_flop(self, implementation: str, level: str) -> int:
        steps = self.reference_steps if self.decodes_less(implementation, level) else self.steps
        return flops.needed(level, self.config, frames=self.frames, beams=self.beams, steps=steps, batch=self.batch)

    def command(self, level: str, dtype: str) -> str:
        """The command that measures a row again."""
        words = ["python", "bench/run.py", "--preset", self.preset, "--level", level, "--dtype", dtype]
        for option in ("device", "frames", "beams", "steps", "batch", "repeats", "threads"):
            words += [f"--{option}", str(getattr(self, option))]
        if self.reference_steps < self.steps:
            words += ["--reference-steps", str(self.reference_steps)]
        if self.accelerate:
            words.append("--accelerate")
        else:
            words += ["--peer", self.peer] if self.peer else ["--no-peer"]
        return shlex.join(words + (["--video", self.video.name] if self.video else []))

    def groups(self, available: int) -> list[tuple[str, ...]]:
        """The dtypes whose workers are alive together: all, if `available` bytes allow, otherwise one after another.

        Each group has a reference of its own, so that what is compared is measured side by side.
        """
        if self.device != "cpu":
            return [self.dtypes]
        parameters = sum(p.numel() for p in MPlug2ForCaptioning(self.config, device="meta").parameters())
        process = 700 << 20  # libraries, and the compiler's in the peer
        copies = 3 if self.peer == "frozen" else 2  # of the weights: the fast model's and the peer's
        resident = sum(copies * parameters * ELEMENT_BYTES[dtype] + 2 * process for dtype in self.dtypes)
        tokens = flops.visual_tokens(self.config, self.frames)
        scores = self.batch * self.config.text.num_attention_heads * tokens**2 * 4
        reference = parameters * 4 + process + 6 * scores
        return [self.dtypes] if resident + reference < 0.9 * available else [(dtype,) for dtype in self.dtypes]

    def specs(self, dtypes: tuple[str, ...], exchange: str) -> Iterator[Spec]:
        """The workers of a group, the reference first."""
        config = self.config.to_dict()
        reference = Spec(
            "reference", "float32", self.device, self.threads, config, self.beams, self.reference_steps, exchange
        )
        yield reference
        for dtype in dtypes:
            kind = "accelerated" if self.accelerate else "fast"
            fast = replace(reference, implementation=kind, dtype=dtype, steps=self.steps)
            yield fast
            if self.peer:
                yield replace(fast, implementation=self.peer)
