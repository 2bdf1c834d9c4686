"""The check on a GPU, with stand-ins for its commands."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import cli, gpu_check, gpu_memcheck, targets
from bench.gpu_check import Check, Finished
from bench.row import COMPARED
from mplug2_fast import ops

ROOT = Path(__file__).parents[2]
DESCRIBED = {
    "date": "2030-01-01T00:00:00+00:00",
    "commit": "abc",
    "card": "A Card",
    "driver": "1.2",
    "cuda": "13.0",
    "python": "3.12",
    "packages": {"torch": "2.11"},
}
JUNIT = """<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1">
<testcase classname="tests.ops" name="good"/><testcase classname="tests.ops" name="bad"><failure>no</failure></testcase>
<testcase classname="tests.ops" name="other"><skipped/></testcase><testcase classname="tests.ops" name="late">
<error message="failed on setup with &quot;not run: the time for all tests is up&quot;"/></testcase>
</testsuite></testsuites>"""


class Runner:
    """Records commands. Their status is that of the log's name, or 0."""

    def __init__(self, **statuses):
        self.statuses, self.commands, self.limits, self.variables = statuses, {}, {}, {}

    def __call__(self, command, log, limit, variables):
        log.write_text("log")
        name = log.stem
        self.commands.setdefault(name, []).append(list(command))
        self.limits.setdefault(name, limit)
        self.variables[name] = dict(variables)
        return Finished(self.statuses.get(name, 0), 1.0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Pretends that there is a GPU."""
    monkeypatch.setattr(gpu_check, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "describe", lambda: DESCRIBED)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: f"/bin/{name}")
    return tmp_path / "out"


def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run(
        [sys.executable, "bench/gpu_check.py"],
        cwd=ROOT,
        env={**gpu_check.os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("no GPU: torch ")
    assert len(done.stderr.splitlines()) == 1


def test_all_steps_pass(gpu, capsys):
    runner = Runner()
    assert gpu_check.main(["--out", str(gpu)], runner) == 0
    assert set(runner.commands) == {"install", *gpu_check.DEFAULT}
    assert sum(runner.limits.values()) > 520  # later steps get the time that earlier ones leave
    assert runner.limits["install"] < 520 / 5
    assert runner.limits["batch"] > 520 - 10
    summary = json.loads((gpu / "summary.json").read_text())
    assert summary["card"] == "A Card"
    assert {step["name"]: step["status"] for step in summary["steps"]} == dict.fromkeys(runner.commands, "passed")
    assert "| model | passed | 0 |" in (gpu / "summary.md").read_text()
    assert "install: passed" in capsys.readouterr().out


def test_a_step_that_fails_stops_no_other(gpu):
    runner = Runner(tests=1, sanitizer=None)
    assert gpu_check.main(["--out", str(gpu)], runner) == 1
    assert set(runner.commands) == {"install", *gpu_check.DEFAULT}
    steps = {step["name"]: step for step in json.loads((gpu / "summary.json").read_text())["steps"]}
    assert (steps["tests"]["status"], steps["ops"]["status"]) == ("failed", "passed")
    assert "exit status 1, see tests.log" in steps["tests"]["note"]
    assert steps["sanitizer"]["status"] == "failed"
    assert "stopped after" in steps["sanitizer"]["note"]


def test_a_step_that_cannot_start_stops_no_other(gpu):
    def run(command, log, limit, variables):
        if log.stem == "ops":
            raise FileNotFoundError("python")
        return Finished(0, 1.0)

    assert gpu_check.main(["--only", "bench", "--out", str(gpu)], run) == 1
    steps = {step["name"]: step for step in json.loads((gpu / "summary.json").read_text())["steps"]}
    assert steps["ops"]["note"] == "FileNotFoundError: python"
    assert steps["model"]["status"] == "passed"


def test_steps_can_be_chosen(gpu, capsys):
    runner = Runner()
    gpu_check.main(["--only", "bench,tests", "--out", str(gpu)], runner)
    assert list(runner.commands) == ["install", "tests", *gpu_check.GROUPS["bench"]]
    runner = Runner()
    gpu_check.main(["--only", "peer", "--budget", "900", "--out", str(gpu)], runner)
    assert list(runner.commands) == ["install", "peer"]
    assert runner.limits["peer"] > 800
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "dance"], runner)
    assert "no such step 'dance': choose from tests, decoding, ops, temporal, " in capsys.readouterr().err


def test_all_gpu_targets_are_measured(tmp_path):
    """Each target has a row, with its baseline, in a command of a step."""
    runner = Runner()
    for name in gpu_check.GROUPS["bench"]:
        Check(tmp_path, runner).step(name, 100)
    parser, keys = cli.make_parser(), []
    for ((_, _, *words),) in runner.commands.values():
        options = parser.parse_args([word if word != "cuda" else "cpu" for word in words])
        mode, options.mode = options.mode, "cold"
        cli.check(options, parser)
        for level in options.level:
            if level == "model":
                found = [cli.plan(options).key(task, "bfloat16") for task in cli.works_of(level, options)]
            else:
                found = cli.keys(level, options)
            keys += [(replace(key, device="cuda"), options.baselines, mode) for key in found]
    for target in targets.TARGETS:
        if target.device == "cuda":
            rows = [(baselines, mode) for key, baselines, mode in keys if target.is_for(SimpleNamespace(key=key))]
            assert rows, target.wanted
            if target.quantity.of in COMPARED:
                assert any(target.quantity.of in baselines for baselines, _ in rows), target.wanted
            assert target.name != "decoder step" or rows[0][1] == "graph"


def test_gpu_tests_are_required_and_missing_packages_are_listed(tmp_path, monkeypatch):
    def found(package):
        return package != "av"

    monkeypatch.setattr(gpu_check, "_found", found)
    (tmp_path / "tests.xml").write_text(JUNIT)
    runner = Runner(tests=1)
    outcome = Check(tmp_path, runner).step("tests", 100)
    (command,) = runner.commands["tests"]
    assert command[:4] == [sys.executable, "-m", "pytest", "tests/gpu"]
    assert "tests/video" not in command
    assert "tests/bench" in command
    assert any(part.startswith("--deselect=tests/examples/test_generator.py::") for part in command)
    assert runner.variables["tests"].keys() == {"MPLUG2_FAST_GPU", "MPLUG2_FAST_TUNING", "MPLUG2_FAST_DEADLINE"}
    assert time.time() < float(runner.variables["tests"]["MPLUG2_FAST_DEADLINE"]) < time.time() + 100
    found = "4 tests, 1 failures, 1 errors, 1 skipped, 1 of the errors after the deadline (tests.ops::bad)"
    assert found in outcome.note
    assert "without av: tests/video" in outcome.note
    assert "skvideo" not in outcome.note


def test_tests_that_need_a_package_exist():
    for tests in gpu_check.NEEDS.values():
        for test in tests:
            path, _, name = test.partition("::")
            assert (ROOT / path).exists(), path
            assert not name or f"def {name}(" in (ROOT / path).read_text()


def test_the_other_tests_are_collected_without_those_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "_found", lambda package: package not in gpu_check.NEEDS)
    (tmp_path / "refuse.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {tuple(gpu_check.NEEDS)!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    runner = Runner()
    Check(tmp_path, runner).step("tests", 100)
    (command,) = runner.commands["tests"]
    named = [part for part in command if part.startswith(("tests/", "--ignore", "--deselect"))]
    arguments = ["-p", "refuse", "--collect-only", "-q", "-p", "no:cacheprovider", *named]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env={**gpu_check.os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    assert collected[0].startswith("tests/gpu/")
    assert len(set(collected)) == len(collected)
    assert not any(line.startswith(("tests/video", "tests/bulk", "tests/test_cli")) for line in collected)


def test_cmake_builds_if_pip_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    for folder in ("kernels", "mplug2_fast"):
        (tmp_path / folder).mkdir()
    runner = Runner(install=1)
    outcome = Check(tmp_path, runner).step("install", 10)
    assert outcome.status == "passed"
    assert "WITHOUT the native module" in outcome.note
    assert (tmp_path / "mplug2_fast" / "kernels").resolve() == tmp_path / "kernels"
    assert [command[0] for command in runner.commands["install"]] == [sys.executable, "cmake"]


def test_a_command_at_its_limit_is_killed_with_its_children(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    start = time.monotonic()
    finished = gpu_check.run_command([sys.executable, "-c", code], tmp_path / "log", 1.0, {})
    assert finished.status is None
    assert time.monotonic() - start < 60


def test_a_command_has_its_variables_and_its_log(tmp_path):
    command = [sys.executable, "-c", "import os; print(os.environ['SOME']); raise SystemExit(3)"]
    assert gpu_check.run_command(command, tmp_path / "log", 60.0, {"SOME": "value"}).status == 3
    assert "\nvalue\n" in (tmp_path / "log").read_text()


def test_the_small_run_for_the_sanitizer(capsys, monkeypatch):
    monkeypatch.setattr(gpu_memcheck, "MAX_SIZES", 1)
    gpu_memcheck.main("cpu")
    assert capsys.readouterr().out.count("\n") == 2 * (len(ops.OPERATORS) - 1)  # linear_fp8 is for GPUs
    sizes = gpu_memcheck.chosen(ops.layer_norm.op)
    assert len(sizes) == 1


@pytest.fixture
def inner(pytester):
    """Runs pytest in this process, with the settings of these tests."""
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    return pytester


@pytest.mark.parametrize(
    ("deadline", "what"),
    [
        ("1", "1 tests, 0 failures, 1 errors, 0 skipped, 1 of the errors after the deadline"),
        ("inf", "1 tests, 0 failures, 0 errors, 0 skipped"),
    ],
)
def test_no_test_starts_after_the_deadline(deadline, what, inner, monkeypatch):
    inner.makepyfile("def test_it(): pass")
    monkeypatch.setenv("MPLUG2_FAST_DEADLINE", deadline)
    inner.runpytest_inprocess("--junitxml=report.xml")
    assert gpu_check.summary_of(inner.path / "report.xml") == what


@pytest.mark.parametrize("required", ["", "required"])
def test_a_skip_fails_if_a_gpu_is_required(required, inner, monkeypatch):
    inner.makepyfile(
        "import pytest\n"
        "@pytest.mark.gpu\n"
        "def test_marked(): pytest.skip('why not')\n"
        "@pytest.mark.parametrize('backend', ['triton'])\n"
        "def test_triton(backend): pytest.skip('why not')\n"
        "def test_other(): pytest.skip('why not')\n"
    )
    monkeypatch.setenv("MPLUG2_FAST_GPU", required)
    done = inner.runpytest_inprocess()
    assert done.parseoutcomes()["skipped"] == (1 if required else 3)
    assert done.ret == bool(required)
    if required:
        done.stdout.fnmatch_lines(["*MPLUG2_FAST_GPU is required, and this was not run*"])
