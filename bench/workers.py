"""Starting worker processes and talking to them; only one of them computes at a time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class WorkerError(Exception):
    """A worker that could not do what it was asked to, with its own words."""


@dataclass(frozen=True)
class Spec:
    """What a worker holds: an implementation of a family of tasks, its sizes, and the folder for inputs and results."""

    implementation: str
    dtype: str
    device: str
    threads: int
    config: dict[str, Any] = field(hash=False)
    beams: int
    steps: int
    exchange: str
    family: str = "captioning"

    @property
    def label(self) -> str:
        return f"{self.implementation} {self.dtype}"


class Client:
    """The driver's end of a worker process, which is still starting. Use as a context manager, or `close` it."""

    def __init__(self, spec: dict[str, Any], label: str) -> None:
        self.label = label
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", json.dumps(spec)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    @classmethod
    def start(cls, spec: Spec) -> Client:
        return cls(asdict(spec), spec.label)

    def ready(self) -> Client:
        """Waits until it has started. Raises `WorkerError` where it could not."""
        self._receive()
        return self

    def call(self, method: str, *arguments: Any) -> Any:
        """The result of a method of the worker. Raises `WorkerError` where it failed or died."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self.process.stdin.flush()
        return self._receive()

    def _receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            answer = json.loads(line)
            if "error" not in answer:
                return answer["ok"]
            message = answer["error"]
        else:
            code = self.process.wait()
            how = "was killed, most likely for want of memory" if code == -9 else f"ended with status {code}"
            self.log.seek(0)
            message = f"the process {how}\n{self.log.read()[-2000:]}".rstrip()
        self.close()
        raise WorkerError(f"{self.label}: {message}")

    def close(self) -> None:
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it is gone, and has not read all of its requests
                self.process.stdin.close()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # nobody waits for what it computes
            self.process.kill()
        self.close()
