"""One process that holds one implementation and runs tasks on request, one JSON line in, one JSON line out.

Run as `python -m bench.worker SPEC`, with SPEC the JSON of `bench.workers.Spec`. Peak memory is its own that way.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from bench import gradients, memory
from bench.case import relative_error
from bench.implementations import IMPLEMENTATIONS
from bench.waterfall_steps import StepWorker
from mplug2_fast import MPlug2Config

# The files that each task takes in, and the one that it leaves for the others.
INPUTS = {
    "vision": ("video",),
    "universal": ("visual",),
    "decode": ("embeds",),
    "captioning": ("video",),
    "features": ("video",),
    "answering": ("video", "question", "question_mask"),
    "training": ("video", "caption", "caption_mask"),
}
OUTPUTS = {"vision": "visual", "universal": "embeds"}


class Worker:
    _MOST_KEPT = 0.2  # of a GPU's memory, between two runs

    def __init__(self, spec: dict[str, Any]) -> None:
        self.device = spec["device"]
        self.exchange = Path(spec["exchange"])
        self.is_reference = spec["implementation"] == "reference"
        config, dtype = MPlug2Config.from_dict(spec["config"]), getattr(torch, spec["dtype"])
        kind = IMPLEMENTATIONS[spec["implementation"]]
        self.implementation = kind(config, dtype, self.device, spec["beams"], spec["steps"], spec["family"])
        gc.collect()
        gc.freeze()  # the modules of PyTorch, which take a collection a quarter of a second

    def _synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def _inputs(self, task: str) -> list[Tensor]:
        inputs = [torch.load(self.exchange / f"{name}.pt").to(self.device) for name in INPUTS[task]]
        dtype = self.implementation.weights_dtype
        return [x.to(dtype) if x.is_floating_point() else x for x in inputs]

    def _target(self, task: str) -> Path:
        return self.exchange / f"{OUTPUTS.get(task, f'{task}_result')}.pt"

    def run(self, task: str, times: int = 1) -> dict[str, Any]:
        """One run, or the median of several in a row: seconds; peak bytes of this process with its weights, and how
        much of it was not there before; the error against the reference, None where there is nothing to compare with.
        """
        inputs = self._inputs(task)
        gc.collect()
        known = memory.reset_peak(self.device)
        before = memory.peak(self.device) if known else None
        taken = [self._timed(task, inputs) for _ in range(times)]
        peak = memory.peak(self.device) if known else None
        self._make_room()
        output = taken[-1][1]
        return {
            "seconds": statistics.median(seconds for seconds, _ in taken),
            "peak_memory_bytes": peak,
            "added_memory_bytes": None if peak is None else peak - before,
            "relative_error": None if task == "training" else self._error(task, output.float().cpu()),
        }

    def _make_room(self) -> None:
        """All workers share the memory of a GPU: what one kept of it, if that is much, goes back."""
        if self.device.startswith("cuda"):
            _, total = torch.cuda.mem_get_info(self.device)
            if torch.cuda.memory_reserved(self.device) > self._MOST_KEPT * total:
                torch.cuda.empty_cache()

    def _timed(self, task: str, inputs: list[Tensor]) -> tuple[float, Tensor]:
        self._synchronize()
        start = time.perf_counter()
        if task == "training":
            output = self.implementation.training(*inputs)
        else:
            with torch.no_grad():
                output = getattr(self.implementation, task)(*inputs)
        self._synchronize()
        return time.perf_counter() - start, output

    def _error(self, task: str, output: Tensor) -> float | None:
        target = self._target(task)
        if self.is_reference:
            torch.save(output, target)
        return relative_error(output, torch.load(target)) if target.exists() else None

    def compare_gradients(self) -> float:
        """The error of the gradients against the reference's, before any step."""
        sketch = gradients.sketch(self.implementation.gradients(*self._inputs("training")))
        self.implementation.optimizer.zero_grad()
        target = self._target("training")
        if self.is_reference:
            torch.save(sketch, target)
        return gradients.relative_error(sketch, torch.load(target))

    def settle(self) -> None:
        """If one thread computes, it stays on one core from here on, that of the other workers too: the cores of a
        shared machine are not equally fast."""
        if torch.get_num_threads() == 1 and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def describe(self) -> dict[str, Any]:
        """Who computes; and after the runs, what of it was not as it should have been."""
        return {"backend": self.implementation.backend, "remarks": self.implementation.remarks()}


def serve(spec: dict[str, Any], requests: TextIO, replies: TextIO) -> None:
    """Answers `[method, *arguments]` with `{"ok": result}` or `{"error": text}` until the requests end."""
    worker: Worker | StepWorker | None = None
    try:
        torch.set_num_threads(spec["threads"])
        worker = (StepWorker if spec["implementation"] == "waterfall" else Worker)(spec)
        answer: dict[str, Any] = {"ok": None}
    except Exception as error:
        answer = {"error": one_line(error)}
    while True:
        print(json.dumps(answer), file=replies, flush=True)
        line = requests.readline()
        if not line or worker is None:
            return
        method, *arguments = json.loads(line)
        try:
            answer = {"ok": getattr(worker, method)(*arguments)}
        except Exception as error:
            answer = {"error": one_line(error)}


def one_line(error: Exception) -> str:
    """The kind of the error and the first line that says something; the whole of it goes to stderr."""
    traceback.print_exception(error)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:300]}"


def main() -> None:
    # Replies have the real stdout to themselves; whatever libraries and compilers print goes to stderr.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(json.loads(sys.argv[1]), sys.stdin, replies)


if __name__ == "__main__":
    main()
