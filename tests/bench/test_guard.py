"""A benchmark that ends, however it ends, leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import guard

ROOT = Path(guard.__file__).parents[1]
LIMIT = 60.0

SCRIPT = """
import signal, subprocess, sys, time
from bench import guard, process

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores both
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def main():
    inner = "import time\\nwhile True: time.sleep(0.1)"
    outer = "import subprocess, sys\\n"
    outer += f"subprocess.Popen([sys.executable, '-c', {inner!r}], start_new_session=True).wait()"
    subprocess.Popen([sys.executable, "-c", outer])
    with process.Process("fresh"), process.Process("preloaded", preloaded=True) as preloaded:
        preloaded.ready().call(time.sleep, 600)

process.PRELOADED = ()
sys.exit(guard.run(main))
"""
"""Starts a process that starts another in a new session, and a process of each kind of the benchmark."""


def descendants(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def commands(processes: list[int]) -> list[str]:
    """The command lines of those that still run."""
    found = []
    for process in processes:
        try:
            found.append(Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [line for line in found if line]  # a zombie has none


def wait_for(what, seconds: float = LIMIT):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)
    return found


def ends_with_all(process: subprocess.Popen, number: int, enough) -> None:
    """Sends a signal once `enough` accepts the running commands, and waits until all descendants are gone."""
    try:
        wait_for(lambda: process.poll() is None and enough(commands(descendants(process.pid))))
        started = descendants(process.pid)
        process.send_signal(number)
        assert process.wait(LIMIT) != 0
        wait_for(lambda: not commands(started))
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGHUP], ids=str)
def test_a_killed_script_leaves_no_process(number, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    kinds = ("while True", "spawn_main", "forkserver")
    ends_with_all(process, number, lambda lines: all(any(kind in line for line in lines) for kind in kinds))
    if number in (signal.SIGTERM, signal.SIGINT):
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["run", "bulk", "gpu_check", "triton_resources"])
def test_scripts_run_under_a_guard(script):
    source = (ROOT / "bench" / f"{script}.py").read_text()
    assert source.split('if __name__ == "__main__":')[-1].rstrip().endswith("sys.exit(guard.run(main))")


def test_a_script_that_returns_keeps_its_status():
    code = "import subprocess, sys\nfrom bench import guard\n"
    code += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    code += "print(child.pid, flush=True)\nsys.exit(guard.run(lambda: 3))"
    code = code.replace("child =", "guard.watch()\nchild =")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
    assert done.returncode == 3
    wait_for(lambda: not commands([int(done.stdout)]))


def test_an_interrupted_script_says_so_in_one_line():
    code = "import sys\nfrom bench import guard\ndef main(): raise KeyboardInterrupt\nsys.exit(guard.run(main))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_guard_kills_only_processes_with_its_mark(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={guard.MARK: "another"})
    try:
        assert not guard._kill(f"{guard.MARK}=anoth".encode())
        assert other.poll() is None
        assert guard._kill(f"{guard.MARK}=another".encode())
        assert other.wait(LIMIT) == -signal.SIGKILL
    finally:
        other.kill()
