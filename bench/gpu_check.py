"""Tests and measures everything on a GPU, without a network or make.

    python bench/gpu_check.py                       # or make gpu-check
    python bench/gpu_check.py --only tests,sanitizer --out FOLDER
    python bench/gpu_check.py --only peer --budget 900    # the model beside its compiled peer, which takes minutes
    python bench/gpu_check.py --only 8-bit                # the model and its products with e4m3 weights

The steps: install this checkout, run the tests with GPU tests required, run compute-sanitizer over a small run, and run
the benchmarks that the GPU targets need. Each step has a share of the time, and a failure stops no other. Logs, JUnit,
JSON and a summary go to --out. The exit status is 1 if a step failed. Outside a git checkout the variable
MPLUG2_FAST_COMMIT names the commit.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Python puts the script's folder on the path; the packages are one level up.
    sys.path[0] = str(ROOT)

STOPPING, REPORTING = 5.0, 25.0
"""Seconds that an interrupted command has to end, and that pytest has to write its report."""
CAPTIONING = "--level model --only captioning --preset large --dtype bfloat16"
BENCHMARKS = {
    "decoding": "--level modules --only 'decoder step' --preset large --dtype bfloat16 --mode graph --baselines eager",
    # Uncompiled to save time, as graphs because some operators take less time than a launch.
    "ops": "--level ops --sizes large --dtype bfloat16 --mode graph --baselines torch --no-memory",
    # The operator that must beat its compiled form.
    "temporal": "--level ops --only local_temporal --sizes large --dtype bfloat16 --mode graph "
    "--baselines eager,compiled",
    "model": f"{CAPTIONING} --baselines reference,eager",
    # A batch that keeps the GPU busy. A slow reference runs once.
    "batch": f"{CAPTIONING} --batch 32 --repeats 3 --baselines reference,compiled",
    # 8-bit weights beside bfloat16, and their products beside PyTorch's. The GPU must multiply e4m3 numbers.
    "fp8": "--level model --only captioning --preset large --dtype bfloat16,fp8 --batch 32 --repeats 3 "
    "--baselines reference",
    "fp8-ops": "--level ops --only linear_fp8 --sizes large --dtype bfloat16 --mode graph --baselines eager "
    "--no-memory",
    "peer": CAPTIONING,
}
"""Step -> options of bench/run.py."""
SHARES = {
    "tests": 230,
    "decoding": 45,
    "ops": 60,
    "temporal": 40,
    "model": 60,
    "sanitizer": 55,
    "batch": 120,
    "fp8": 90,
    "fp8-ops": 30,
    "peer": 300,
}
"""Step -> relative share of the time, in the order of the steps. The installation comes before them."""
INSTALL_SHARE = 60
GROUPS = {"bench": ("decoding", "ops", "temporal", "model", "batch"), "8-bit": ("fp8", "fp8-ops")}
DEFAULT = ("tests", "sanitizer", *GROUPS["bench"])
LATE = "the time for all tests is up"
"""What tests/conftest.py says about a test after the deadline."""
NEEDS = {
    "av": (
        "tests/video",
        "tests/bulk",
        "tests/images",
        "tests/test_cli.py",
        "tests/test_cli_bulk.py",
        "tests/test_cli_classify.py",
        "tests/test_cli_mplug.py",
        "tests/test_docs.py",
        "tests/test_predict.py",
        "tests/test_ray.py",
        "tests/examples/test_generator.py::test_an_encoded_clip_looks_as_it_was_drawn",
        "tests/examples/test_moving_shapes.py::test_frames_become_pixels_as_load_video_makes_them",
    ),
    "skvideo": ("tests/video/test_frames.py",),
}
"""Tests that need a package. Without a network it may be missing."""
FIRST = ("tests/gpu", "tests/ops", "tests/nn", "tests/models", "tests/golden")
"""These run first, because they use the GPU and time may run out."""
PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "setuptools", "av")


@dataclass(frozen=True)
class Finished:
    """A command that ran. status: its exit status; None if its time was up."""

    status: int | None
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """A step. status: "passed", "failed" or "left out". note: why, or what was found."""

    name: str
    status: str
    seconds: float = 0.0
    command: str = ""
    note: str = ""


Run = Callable[[Sequence[str], Path, float, Mapping[str, str]], Finished]
"""From command, log file, limit in seconds and added environment variables."""


def run_command(command: Sequence[str], log: Path, limit: float, variables: Mapping[str, str]) -> Finished:
    """Runs in the checkout. At the limit the command is interrupted, so that it can write its results, and then killed
    with everything that it started."""
    start = time.monotonic()
    with log.open("a") as output:
        output.write(f"$ {shlex.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOPPING)
        finally:
            _kill_group(process)
    return Finished(status, time.monotonic() - start)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass
class Check:
    """The steps. They write to `out` and run commands with `run`."""

    out: Path
    run: Run = run_command

    def step(self, name: str, limit: float) -> Outcome:
        start = time.monotonic()
        try:
            outcome = self.bench(name, limit) if name in BENCHMARKS else getattr(self, name)(limit)
        except Exception as error:  # a step that cannot start must not stop the others
            outcome = Outcome(name, "failed", note=f"{type(error).__name__}: {error}")
        return replace(outcome, seconds=round(time.monotonic() - start, 1))

    def _command(self, name: str, command: Sequence[str], limit: float, **variables: str) -> Outcome:
        finished = self.run(command, self.out / f"{name}.log", limit, variables)
        status = "passed" if finished.status == 0 else "failed"
        note = "" if finished.status == 0 else f"exit status {finished.status}, see {name}.log"
        if finished.status is None:
            note = f"stopped after {limit:.0f} s, see {name}.log"
        return Outcome(name, status, command=shlex.join(command), note=note)

    def install(self, limit: float) -> Outcome:
        """Installs with pip and the installed packages. If that fails, builds the native module with CMake and links
        the package's folders."""
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-e", "."]
        outcome = self._command("install", pip, limit)
        if outcome.status == "passed":
            return replace(outcome, note="pip, editable")
        link = ROOT / "mplug2_fast" / "kernels"
        if not link.exists():
            link.symlink_to(Path("..") / "kernels")
        build = str(ROOT / "build" / "gpu-check")
        steps = (
            ["cmake", "-S", str(ROOT), "-B", build, f"-DPython_EXECUTABLE={sys.executable}"],
            ["cmake", "--build", build, "--parallel"],
            ["cmake", "--install", build, "--prefix", str(ROOT)],
        )
        built = all(self._command("install", step, limit).status == "passed" for step in steps)
        native = "CMake built the native module" if built else "WITHOUT the native module"
        note = f"pip failed ({outcome.note}): kernels is linked into mplug2_fast, {native}"
        return replace(outcome, status="passed", note=note)

    def tests(self, limit: float) -> Outcome:
        report, missing = self.out / "tests.xml", list(missing_tests())
        # pytest collects named paths even if --ignore names them.
        present = [path for path in ordered_tests() if path not in {test for _, test in missing}]
        command = [sys.executable, "-m", "pytest", *present, "-v", "-p", "no:cacheprovider", f"--junitxml={report}"]
        if _found("xdist"):
            command += ["--numprocesses", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
        if _found("pytest_timeout"):
            command += ["--timeout", "100"]
        command += [f"--{'deselect' if '::' in test else 'ignore'}={test}" for _, test in missing]
        # An interrupted pytest-xdist writes no report, so the tests themselves stop at a deadline.
        deadline = time.time() + max(limit - REPORTING, 0.8 * limit)
        variables = {"MPLUG2_FAST_GPU": "required", "MPLUG2_FAST_DEADLINE": str(deadline)}
        outcome = self._command("tests", command, limit, MPLUG2_FAST_TUNING="off", **variables)
        notes = [outcome.note, summary_of(report)]
        notes += [f"without {package}: {test}" for package, test in missing]
        return replace(outcome, note="; ".join(filter(None, notes)))

    def sanitizer(self, limit: float) -> Outcome:
        tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if tool is None:
            return Outcome("sanitizer", "left out", note="compute-sanitizer is not installed")
        command = [tool, "--tool", "memcheck", "--target-processes", "application-only", "--error-exitcode", "9"]
        command += [sys.executable, "-m", "bench.gpu_memcheck"]
        # Each tensor has its own allocation, so that reading beyond it is an error.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "MPLUG2_FAST_TUNING": "off"}
        return self._command("sanitizer", command, limit, **variables)

    def bench(self, name: str, limit: float) -> Outcome:
        target = ["--device", "cuda", "--json", str(self.out / f"{name}.json")]
        command = [sys.executable, "bench/run.py", *shlex.split(BENCHMARKS[name]), *target]
        return self._command(name, command, limit, MPLUG2_FAST_TUNING=str(self.out / "tuning"))


def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def ordered_tests() -> list[str]:
    """All folders and files of tests. None contains another, or pytest would sort them by name."""
    files = sorted(
        {*(ROOT / "tests").glob("test_*.py"), *(path.parent for path in (ROOT / "tests").glob("*/test_*.py"))}
    )
    return list(dict.fromkeys([*FIRST, *(path.relative_to(ROOT).as_posix() for path in files)]))


def missing_tests() -> Iterator[tuple[str, str]]:
    """(package, test) for tests that are left out because a package is missing."""
    seen = set()
    for package, tests in NEEDS.items():
        for test in tests:
            if not _found(package) and not any(test.startswith(other) for other in seen):
                seen.add(test)
                yield package, test


def summary_of(report: Path) -> str:
    """The counts in a JUnit file, and the first tests that failed before the deadline."""
    if not report.exists():
        return "no report was written"
    suites = ElementTree.parse(report).getroot().findall("testsuite")
    number = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    cases = [case for suite in suites for case in suite.iter("testcase")]
    reasons = [(case, reason) for case in cases for kind in ("failure", "error") for reason in case.findall(kind)]
    late = [case for case, reason in reasons if LATE in reason.get("message", "")]
    bad = [case for case, _ in reasons if case not in late]
    text = ", ".join(f"{count} {key}" for key, count in number.items())
    names = ", ".join(f"{case.get('classname')}::{case.get('name')}" for case in bad[:20])
    text += f", {len(late)} of the errors after the deadline" if late else ""
    return text + (f" ({names}{', …' if len(bad) > 20 else ''})" if bad else "")


def no_gpu() -> str | None:
    """Why this machine cannot be checked; None if it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    if torch.cuda.is_available():
        return None
    why = "was built without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda} finds no device"
    return f"no GPU: torch {torch.__version__} {why}"


def describe() -> dict[str, Any]:
    """Date, card, driver, versions and commit; "unknown" where a tool is missing."""
    import torch

    from bench import machine

    def output_of(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return "unknown"
        return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "unknown"

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    smi = output_of("nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit() or "unknown",
        "card": torch.cuda.get_device_name(0),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "cards": torch.cuda.device_count(),
        "driver": smi.split(",")[0],
        "cuda": torch.version.cuda,
        "nvcc": output_of("nvcc", "--version"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {package: version(package) for package in PACKAGES},
    }


def write(out: Path, described: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Writes summary.json and summary.md. Called after each step, so that there is always one."""
    steps = [asdict(outcome) for outcome in outcomes]
    (out / "summary.json").write_text(json.dumps({**described, "steps": steps}, indent=1) + "\n")
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    lines = [
        f"# {described['card']}, {described['date']}",
        "",
        f"Commit {described['commit']}; driver {described['driver']}, CUDA {described['cuda']}, "
        f"Python {described['python']}; {packages}.",
        "",
        "| step | status | seconds | |",
        "| --- | --- | ---: | --- |",
        *(f"| {o.name} | {o.status} | {o.seconds:.0f} | {o.note.replace('|', '/')} |" for o in outcomes),
    ]
    (out / "summary.md").write_text("\n".join(lines) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. `only` is the list of steps after the installation."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*SHARES, *GROUPS]
    parser.add_argument("--only", metavar="STEP[,STEP]", default=",".join(DEFAULT), help=", ".join(known))
    parser.add_argument("--budget", type=float, default=520, help="seconds for all steps (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build/gpu-check",
        help="folder for logs and results (default: build/gpu-check)",
    )
    options = parser.parse_args(arguments)
    chosen = [step for name in options.only.split(",") for step in GROUPS.get(name, (name,))]
    for name in chosen:
        if name not in known:
            parser.error(f"no such step {name!r}: choose from {', '.join(known)}")
    options.only = [name for name in SHARES if name in chosen]
    return options


def main(arguments: Sequence[str] | None = None, run: Run = run_command) -> int:
    options = parse(arguments)
    if reason := no_gpu():
        print(reason, file=sys.stderr)
        return 1
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    check, end = Check(out, run), time.monotonic() + options.budget
    described, outcomes = describe(), list[Outcome]()
    steps = {"install": INSTALL_SHARE, **{name: SHARES[name] for name in options.only}}
    for index, name in enumerate(steps):
        share = steps[name] / sum(list(steps.values())[index:])
        outcome = check.step(name, max(1.0, share * (end - time.monotonic())))
        outcomes.append(outcome)
        write(out, described, outcomes)
        print(f"{name}: {outcome.status}, {outcome.seconds:.0f} s. {outcome.note}", flush=True)
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    from bench import guard

    sys.exit(guard.run(main))
