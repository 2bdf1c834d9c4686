"""However a benchmark ends, what it started ends with it."""

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

# Starts a process that starts another in a new session; both then compute.
SCRIPT = """
import subprocess, sys, time
from bench import guard

def main():
    inner = "import time\\nwhile True: pass"
    outer = "import subprocess, sys\\n"
    outer += f"subprocess.Popen([sys.executable, '-c', {inner!r}], start_new_session=True).wait()"
    subprocess.Popen([sys.executable, "-c", outer])
    while True: time.sleep(1)

sys.exit(guard.run(main))
"""


def descendants(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def commands(processes: list[int]) -> list[str]:
    """Command lines of those that are still running."""
    found = []
    for process in processes:
        try:
            found.append(Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [line for line in found if line]  # a process that has ended and waits for its parent has none


def wait_for(what, seconds: float = LIMIT):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)
    return found


def ends_with_all(process: subprocess.Popen, number: int, enough) -> None:
    """Sends a signal as soon as `enough` of the commands runs, and waits until all descendants are gone."""
    try:
        wait_for(lambda: process.poll() is None and enough(commands(descendants(process.pid))))
        started = descendants(process.pid)
        process.send_signal(number)
        assert process.wait(LIMIT) != 0
        wait_for(lambda: not commands(started))
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGHUP], ids=str)
def test_whatever_it_started_ends_with_a_script(number):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, stderr=subprocess.DEVNULL)
    ends_with_all(process, number, lambda lines: sum("while True" in line for line in lines) >= 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=str)
def test_a_forked_case_ends_with_its_script(number):
    code = "import sys, time\nfrom bench import fork, guard\nfork.PRELOADED = ()\n"
    code += "sys.exit(guard.run(lambda: fork.call(time.sleep, 600)))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    ends_with_all(process, number, lambda lines: sum("forkserver" in line for line in lines) >= 2)


def test_workers_end_with_the_benchmark(tmp_path):
    command = [sys.executable, "bench/run.py", "--quick", "--waterfall"]
    exchange = tmp_path / "exchange"
    exchange.mkdir()
    environment = os.environ | {"TMPDIR": str(exchange), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **quiet)
    ends_with_all(process, signal.SIGTERM, lambda lines: any("bench.worker" in line for line in lines))
    assert list(exchange.iterdir()) == []


def test_a_script_that_ends_by_itself_leaves_nothing_and_keeps_its_status():
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


def test_a_guard_ends_only_what_has_its_mark(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={guard.MARK: "another"})
    try:
        assert not guard._kill(f"{guard.MARK}=anoth".encode())
        assert other.poll() is None
        assert guard._kill(f"{guard.MARK}=another".encode())
        assert other.wait(LIMIT) == -signal.SIGKILL
    finally:
        other.kill()
