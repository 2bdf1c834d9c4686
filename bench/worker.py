"""One process that holds one implementation and runs levels on request, one JSON line in, one JSON line out.

Run as `python -m bench.worker SPEC`, with SPEC the JSON of `bench.workers.Spec`. Peak memory is its own that way.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from bench import ceilings
from bench.implementations import IMPLEMENTATIONS
from bench.waterfall_steps import StepWorker
from mplug2_fast import MPlug2Config

# What each level takes in, and by which name its result is left for the others.
INPUTS = {"vision": "video", "universal": "visual", "decode": "embeds", "captioning": "video"}
OUTPUTS = {"vision": "visual", "universal": "embeds", "decode": "decode_scores", "captioning": "captioning_scores"}


class Worker:
    def __init__(self, spec: dict[str, Any]) -> None:
        self.device = spec["device"]
        self.dtype = getattr(torch, spec["dtype"])
        self.exchange = Path(spec["exchange"])
        self.is_reference = spec["implementation"] == "reference"
        config = MPlug2Config.from_dict(spec["config"])
        kind = IMPLEMENTATIONS[spec["implementation"]]
        self.implementation = kind(config, self.dtype, self.device, spec["beams"], spec["steps"])

    def _synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def _input(self, level: str) -> Tensor:
        return torch.load(self.exchange / f"{INPUTS[level]}.pt").to(self.device, self.dtype)

    def run(self, level: str) -> dict[str, Any]:
        """One run: seconds, peak bytes of this process with its weights, and the error against the reference."""
        source = self._input(level)
        gc.collect()
        known = reset_peak_memory(self.device)
        self._synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            output = getattr(self.implementation, level)(source)
        self._synchronize()
        seconds = time.perf_counter() - start
        peak = peak_memory(self.device) if known else None
        output = output.float().cpu()
        target = self.exchange / f"{OUTPUTS[level]}.pt"
        if self.is_reference:
            torch.save(output, target)
        error = relative_error(output, torch.load(target))
        return {"seconds": seconds, "peak_memory_bytes": peak, "relative_error": error}

    def describe(self) -> dict[str, Any]:
        return {"backend": self.implementation.backend}


class CeilingsWorker:
    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec

    def measure(self) -> dict[str, Any]:
        return ceilings.measure(self.spec["device"], self.spec["dtypes"], quick=self.spec["quick"])


def relative_error(value: Tensor, expected: Tensor) -> float | None:
    """Norm of the difference over the norm of what is expected; None where the shapes do not allow it."""
    if value.shape != expected.shape:
        return None
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def reset_peak_memory(device: str) -> bool:
    """False where the system cannot tell a process's peak memory, as in some sandboxes."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: str) -> int:
    """Bytes since the last reset: of the allocator on CUDA, resident in the whole process on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def serve(spec: dict[str, Any], requests: TextIO, replies: TextIO) -> None:
    """Answers `[method, *arguments]` with `{"ok": result}` or `{"error": text}` until the requests end."""
    worker: Worker | CeilingsWorker | StepWorker | None = None
    try:
        torch.set_num_threads(spec["threads"])
        kinds = {"ceilings": CeilingsWorker, "waterfall": StepWorker}
        worker = kinds.get(spec["implementation"], Worker)(spec)
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
