"""What a wheel and a source distribution hold, and what a build does where the compiler fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 240
# All that a build reads. Tests need what the source distribution holds.
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
FOLDERS = ("csrc", "kernels", "mplug2_fast")
IGNORED = shutil.ignore_patterns("__pycache__", "_C*.so", "_native_build.json", "kernels")

# A compiler that makes an empty object of every source, unless the line it is called with matches a pattern.
COMPILER = """#!/bin/bash
printf '%s\\n' "$*" >> "$CALLS"
if [[ "$*" =~ $CRASHES ]]; then
    echo "clang++: error: unable to execute command: Segmentation fault"
    exit 139
fi
for argument in "$@"; do
    shift
    case "$argument" in */csrc/*.cpp) argument="$EMPTY" ;; esac
    set -- "$@" "$argument"
done
exec g++ "$@"
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what the package is built from, as it is in a fresh checkout."""
    target = tmp_path / "sources"
    target.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, target)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=IGNORED if name == "mplug2_fast" else None)
    return target


def build(sources: Path, what: str, **variables: str) -> tuple[Path, str]:
    """(the built archive, the output), by setuptools with what is installed here."""
    out = sources.parent / "built"
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(out)!r}))"
    environment = {name: text for name, text in os.environ.items() if not name.startswith("MPLUG2_FAST")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=sources,
        env=environment | {"MPLUG2_FAST_CUDA": "off"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return out / done.stdout.split()[-1], done.stdout


def modules(sources: Path) -> set[str]:
    """What a wheel without the native module has to hold of the package."""
    names = {f"mplug2_fast/{path.relative_to(sources / 'mplug2_fast')}" for path in files(sources / "mplug2_fast")}
    return names | {
        f"mplug2_fast/kernels/{path.relative_to(sources / 'kernels')}" for path in files(sources / "kernels")
    }


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_a_wheel_holds_what_the_sources_hold_whatever_was_built_before(sources):
    version = "".join(map(str, sys.version_info[:2]))
    machine = os.uname().machine
    for folder in (
        f"lib.linux-{machine}-cpython-{version}",
        "lib.linux-x86_64-cpython-39",
        f"bdist.linux-{machine}/wheel",
    ):
        stale = sources / "build" / folder / "mplug2_fast"
        stale.mkdir(parents=True)
        for name in ("_C.old.so", "gone.py", "_native_build.json"):
            (stale / name).touch()
    (sources / "mplug2_fast" / "_C.cpython-311-x86_64-linux-gnu.so").touch()  # of an editable installation
    (sources / "mplug2_fast" / "_native_build.json").write_text('{"built": true}')
    (sources / "mplug2_fast.egg-info").mkdir()
    (sources / "mplug2_fast.egg-info" / "SOURCES.txt").write_text("mplug2_fast/gone.py\ncsrc/cpu/isa.h\n")
    (sources / "mplug2_fast.egg-info" / "requires.txt").write_text("gone\n")
    wheel, _ = build(sources, "wheel", MPLUG2_FAST_NATIVE="off")
    wanted = modules(sources) - {"mplug2_fast/_C.cpython-311-x86_64-linux-gnu.so"}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == wanted
        report = json.loads(archive.read("mplug2_fast/_native_build.json"))
        assert (report["built"], report["left_out"]) == (False, {})
        info = {
            name.partition(".dist-info/")[2]: archive.read(name).decode()
            for name in archive.namelist()
            if ".dist-info/" in name
        }
    assert {"licenses/LICENSE", "licenses/NOTICE"} <= info.keys()
    assert "BERT" in info["licenses/NOTICE"]
    assert "gone" not in info["METADATA"]

    (sources / "mplug2_fast" / "ray.py").unlink()
    wheel, _ = build(sources, "wheel", MPLUG2_FAST_NATIVE="off")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == wanted - {"mplug2_fast/ray.py"}


def test_an_editable_installation_without_the_native_module_removes_the_old_one(sources):
    code = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    suffix = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    old, other = (sources / "mplug2_fast" / f"_C{name}" for name in (suffix, ".cpython-39-x86_64-linux-gnu.so"))
    old.touch()
    other.touch()
    build(sources, "editable", MPLUG2_FAST_NATIVE="off")
    assert not old.exists()
    assert other.exists()
    assert json.loads((sources / "mplug2_fast" / "_native_build.json").read_text())["built"] is False


@pytest.fixture
def compiler(tmp_path, sources):
    """The variables that make a build use the compiler above."""
    if not all(map(shutil.which, ("cmake", "g++", "bash"))):
        pytest.skip("CMake or g++ is not installed")
    script = tmp_path / "c++"
    script.write_text(COMPILER)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "empty.cpp").touch()
    return {"CXX": str(script), "EMPTY": str(tmp_path / "empty.cpp"), "CALLS": str(tmp_path / "calls")}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="no other processor has optional instruction sets")
@pytest.mark.parametrize("policy", ["auto", "required"])
def test_an_instruction_set_that_the_compiler_crashes_on_is_left_out(sources, compiler, policy):
    crashes = r"MPLUG2_ISA=avx512_bf16 .*/attention\.cpp"
    wheel, output = build(sources, "wheel", **compiler, CRASHES=crashes, MPLUG2_FAST_NATIVE=policy)
    with zipfile.ZipFile(wheel) as archive:
        report = json.loads(archive.read("mplug2_fast/_native_build.json"))
        assert any("/_C." in name for name in archive.namelist())
    assert report["built"] is True
    assert list(report["left_out"]) == ["avx512_bf16"]
    assert "Segmentation fault" in report["left_out"]["avx512_bf16"]
    assert "WITHOUT its kernels for avx512_bf16" in output
    # The rest was compiled for the sets that are there.
    last = [line for line in Path(compiler["CALLS"]).read_text().splitlines() if "bind/module.cpp" in line][-1]
    assert set(re.findall(r"-DMPLUG2_WITHOUT_\w+", last)) == {"-DMPLUG2_WITHOUT_AVX512_BF16"}


@pytest.mark.parametrize("crashes", [r"MPLUG2_ISA=portable .*/layer_norm\.cpp", r"bind/module\.cpp"])
def test_code_that_does_not_compile_at_all_stops_the_build(sources, compiler, crashes):
    with pytest.raises(AssertionError, match="the native module of mplug2_fast does not build"):
        build(sources, "wheel", **compiler, CRASHES=crashes)


def test_the_native_module_here_has_every_instruction_set(native_module):
    if os.environ.get("MPLUG2_FAST_NATIVE") != "required":
        pytest.skip("a compiler may fail on some, unless MPLUG2_FAST_NATIVE is required")
    compiled = [name for name, isa in native_module.Isa.__members__.items() if native_module.is_compiled(isa)]
    assert compiled == (list(native_module.Isa.__members__) if os.uname().machine == "x86_64" else ["portable"])


def test_the_source_distribution_holds_all_that_is_tracked(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    command = ["git", "ls-files"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=LIMIT, check=True)
    held = (tmp_path / "mplug2_fast.egg-info" / "SOURCES.txt").read_text().splitlines()
    wanted = [name for name in tracked if not name.startswith(".ci/") and (ROOT / name).exists()]
    assert sorted(set(wanted) - set(held)) == []
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_lower_bounds_are_those_that_are_tested():
    text = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("]\n")[0]
    bounds = dict(re.findall(r'"([a-z]+)>=([0-9.]+)"', text))
    assert len(bounds) == text.count('",')  # all have one
    lines = (ROOT / "tests" / "lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert bounds.keys() - tested.keys() == {"torch"}
    assert all(tested[name].startswith(f"{bound}.") for name, bound in bounds.items() if name != "torch")
