"""A worker is a process that holds one implementation and runs the benchmark's tasks."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import memory
from bench.case import relative_error
from bench.ceilings import torch_dtype
from bench.flops import STEPS
from bench.implementations import implementation
from bench.loader import Loader
from bench.plan import LOADER, Spec
from bench.weights import seeded_noise

INPUTS = {
    "vision": ("video",),
    "universal": ("visual",),
    "decode": ("embeds",),
    "captioning": ("video",),
    "features": ("video",),
    "answering": ("video", "question", "question_mask"),
    "ranking": ("video", "question", "question_mask", "candidates", "candidates_mask"),
    "grounding": ("video", "question", "question_mask"),
    "text states": ("texts", "texts_mask"),
    "long text states": ("long_texts", "long_texts_mask"),
    "retrieval features": ("video", "texts", "texts_mask"),
    "re-ranking": ("embeds", "states", "texts_mask"),
    "re-ranking long texts": ("embeds", "long_states", "long_texts_mask"),
    "captioning step": ("video", "caption", "caption_mask"),
    "answering step": ("video", "question", "question_mask", "answer", "answer_mask"),
}
"""The files that each task reads from the exchange folder."""
CHECKPOINTED = " checkpointed"
OUTPUTS = {
    "vision": "visual",
    "universal": "embeds",
    "features": "embeds",
    "text states": "states",
    "long text states": "long_states",
}
"""The file that the reference's result becomes; other tasks read it."""
ZERO = 1e-6
"""Gradients below this share of the largest norm are rounding. Biases of keys are: shifting all scores of a query
changes nothing."""


class Worker:
    _MAX_KEPT = 0.2  # share of a GPU's memory, between two runs

    def __init__(self, spec: Spec) -> None:
        torch.set_num_threads(spec.threads)
        self.device, self.exchange = spec.device, Path(spec.exchange)
        self.is_reference = spec.implementation == "reference"
        self.implementation = implementation(spec.implementation, spec.config)(
            spec.config, torch_dtype(spec.dtype), spec.device, spec.beams, spec.steps, spec.family
        )
        self._loader = Loader(spec.config, self.exchange)
        gc.collect()
        gc.freeze()  # a collection over PyTorch's modules takes a quarter of a second

    def _inputs(self, task: str) -> list[Tensor]:
        names = () if task == LOADER else INPUTS[task.removesuffix(CHECKPOINTED)]
        inputs = [torch.load(self.exchange / f"{name}.pt").to(self.device) for name in names]
        dtype = self.implementation.weights_dtype
        return [x.to(dtype) if x.is_floating_point() else x for x in inputs]

    def _target(self, task: str) -> Path:
        return self.exchange / f"{OUTPUTS.get(task, f'{task}_result')}.pt"

    def run(self, task: str, times: int = 1) -> dict[str, Any]:
        """One run, or the median of several in a row.

        Returns its seconds, the peak bytes of this process with weights, the bytes that the run added, and the error
        against the reference. None: the system does not report memory, or there is nothing to compare with.
        """
        inputs = self._inputs(task)
        gc.collect()
        known = memory.reset_peak(self.device)
        before = memory.peak(self.device) if known else None
        runs = [timed(self.device, lambda: self._compute(task, inputs)) for _ in range(times)]
        peak = memory.peak(self.device) if known else None
        self._make_room()
        output = runs[-1][1]
        return {
            "seconds": statistics.median(seconds for seconds, _ in runs),
            "peak_memory_bytes": peak,
            "added_memory_bytes": None if peak is None else peak - before,
            "relative_error": None if task in (*STEPS, LOADER) else self._error(task, output.float().cpu()),
        }

    def _make_room(self) -> None:
        """Releases a GPU's memory if this worker keeps much of it, because all workers share it."""
        if self.device.startswith("cuda"):
            _, total = torch.cuda.mem_get_info(self.device)
            if torch.cuda.memory_reserved(self.device) > self._MAX_KEPT * total:
                torch.cuda.empty_cache()

    def _compute(self, task: str, inputs: list[Tensor]) -> Tensor:
        if task == LOADER:
            return self._loader()
        if task in STEPS:
            return self.implementation.step(inputs, checkpointed=task.endswith(CHECKPOINTED))
        with torch.no_grad():
            return self.implementation.method(task)(*inputs)

    def _error(self, task: str, output: Tensor) -> float | None:
        target = self._target(task)
        if self.is_reference:
            torch.save(output, target)
        return relative_error(output, torch.load(target)) if target.exists() else None

    def compare_gradients(self, task: str) -> float:
        """The error of loss, gradients and their norm against the reference's, before any step: the largest of the
        three."""
        loss, gradients = self.implementation.gradients(self._inputs(task), checkpointed=task.endswith(CHECKPOINTED))
        norm = torch.nn.utils.get_total_norm(gradients.values()).float().cpu()
        sketch = sketch_of(gradients)
        self.implementation.optimizer.zero_grad()
        target = self._target(task)
        if self.is_reference:
            torch.save((loss.float().cpu(), norm, sketch), target)
        exact_loss, exact_norm, exact_sketch = torch.load(target)
        errors = relative_error(loss.float().cpu(), exact_loss), relative_error(norm, exact_norm)
        return max(*errors, sketch_error(sketch, exact_sketch))

    def settle(self) -> None:
        """Pins a single-threaded worker to one core, the same for all workers: cores of a shared machine differ in
        speed."""
        if torch.get_num_threads() == 1 and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def describe(self) -> tuple[str, list[str]]:
        """The backend, and after the runs remarks on what was not as it should have been."""
        return self.implementation.backend, self.implementation.remarks()


def timed(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result, with everything on the device finished before and after."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def sketch_of(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each gradient times a vector of seeded noise: one number per row instead of gigabytes. On average the norm of a
    difference of sketches is that of the difference of the gradients."""
    return {
        name: gradient.flatten(1).float().cpu() @ seeded_noise(name, gradient[0].numel())
        if gradient.dim() > 1
        else gradient.float().cpu()
        for name, gradient in gradients.items()
    }


def sketch_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The root mean square of the parameters' relative errors: a small gradient counts as much as a large one."""
    norms = {name: float(value.double().norm()) for name, value in expected.items()}
    least = ZERO * max(norms.values())
    errors = [
        float((found[name].double() - expected[name].double()).norm()) / norm
        for name, norm in norms.items()
        if norm > least
    ]
    error = math.sqrt(sum(error**2 for error in errors) / len(errors))
    return error if error == error else math.inf
