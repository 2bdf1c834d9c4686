"""The contents of wheels and source distributions, and builds whose compiler fails.

Tests with the marker `package` build wheels and call compilers: `make test-package` runs them.
"""

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
LIMIT = 1200
# All that a build reads. Tests need what the source distribution holds.
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
FOLDERS = ("csrc", "kernels", "mplug2_fast")
IGNORED = shutil.ignore_patterns("__pycache__", "_C*.so", "_native_build.json", "kernels")

CRASH = "error: unable to execute command: Segmentation fault"

# A compiler that crashes where its command line matches a pattern. If EMPTY is set, it compiles that file instead of
# every source. It does not optimise.
COMPILER = f"""#!/bin/bash
printf '%s\\n' "$*" >> "$CALLS"
if [[ "$*" =~ $CRASHES ]]; then
    echo "clang++: {CRASH}"
    exit 139
fi
for argument in "$@"; do
    shift
    case "$argument" in
        */csrc/*.cpp) argument="${{EMPTY:-$argument}}" ;;
        -O3) argument=-O0 ;;
        -flto*) continue ;;
    esac
    set -- "$@" "$argument"
done
exec g++ "$@"
"""

# A CMake for which the compiler crashes on a target, or on the code that every build needs (`all`).
CMAKE = f"""#!/bin/bash
crash() {{ echo "clang++: {CRASH}"; exit 1; }}
case "$1" in
    -S) mkdir -p "$4" && printf 'avx2;avx512_bf16' > "$4/optional_kernels.txt" ;;
    -DMPLUG2_LEFT_OUT=*) echo "${{1#*=}}" > "$2/left_out" ;;
    --build)
        if [[ "$CRASHES" == "$5" ]]; then crash; fi
        if [[ -z "$5" && ("$CRASHES" == all || ! -e "$2/left_out") ]]; then crash; fi ;;
    --install) mkdir -p "$4/mplug2_fast" && cp "$2/left_out" "$4/mplug2_fast/_C.so" ;;
esac
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the package's sources, as in a fresh checkout."""
    target = tmp_path / "sources"
    target.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, target)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=IGNORED if name == "mplug2_fast" else None)
    return target


def build(sources: Path, what: str, **variables: str) -> tuple[Path, str]:
    """(the built archive, the output) of setuptools with the installed packages."""
    out = sources.parent / "built"
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(out)!r}))"
    output = run(["-c", code], sources, **variables)
    return out / output.split()[-1], output


def run(arguments: list[str], folder: Path, **variables: str) -> str:
    """The output of Python. `AssertionError` with the output if it fails."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("MPLUG2_FAST")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment | {"MPLUG2_FAST_CUDA": "off"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def modules(sources: Path) -> set[str]:
    """The files that a wheel without the native module must have."""
    names = {f"mplug2_fast/{path.relative_to(sources / 'mplug2_fast')}" for path in files(sources / "mplug2_fast")}
    return names | {
        f"mplug2_fast/kernels/{path.relative_to(sources / 'kernels')}" for path in files(sources / "kernels")
    }


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_a_build_holds_what_the_sources_hold_whatever_was_built_before(tmp_path):
    build_base = ["--build-base", str(tmp_path / "build")]
    command = ["setup.py", "-q", "build", *build_base, "--build-lib", str(tmp_path / "build" / "lib")]
    stale = tmp_path / "build" / "lib" / "mplug2_fast"
    stale.mkdir(parents=True)
    for name in ("_C.old.so", "gone.py"):
        (stale / name).touch()
    run(command, ROOT, MPLUG2_FAST_NATIVE="off")
    ours = re.compile(r"mplug2_fast/(_C.*\.so|kernels|_native_build\.json)$")  # of an editable installation
    wanted = {name for name in modules(ROOT) if not ours.match(name)} | {"mplug2_fast/_native_build.json"}
    assert {str(path.relative_to(stale.parent)) for path in files(stale)} == wanted
    assert json.loads((stale / "_native_build.json").read_text())["built"] is False


@pytest.mark.parametrize("policy", ["auto", "required"])
def test_an_instruction_set_that_the_compiler_crashes_on_is_left_out(tmp_path, policy):
    package = build_with_fake_cmake(tmp_path, CRASHES="kernels_avx512_bf16", MPLUG2_FAST_NATIVE=policy)
    report = json.loads((package / "_native_build.json").read_text())
    assert report["built"] is True
    assert report["left_out"] == {"avx512_bf16": f"The compiler failed: clang++: {CRASH}"}
    assert (package / "_C.so").read_text() == "avx512_bf16\n"


def test_code_that_every_build_needs_stops_the_build(tmp_path):
    with pytest.raises(AssertionError, match="the native module of mplug2_fast does not build"):
        build_with_fake_cmake(tmp_path, CRASHES="all")


def build_with_fake_cmake(folder: Path, **variables: str) -> Path:
    """The package's folder, with what `build_ext` writes."""
    executable(folder / "cmake", CMAKE)
    command = ["setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    run(command, ROOT, PATH=f"{folder}:{os.environ['PATH']}", **variables)
    return folder / "lib" / "mplug2_fast"


@pytest.mark.package
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

    (sources / "mplug2_fast" / "text.py").unlink()
    wheel, _ = build(sources, "wheel", MPLUG2_FAST_NATIVE="off")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == wanted - {"mplug2_fast/text.py"}


@pytest.mark.package
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
    executable(script, COMPILER)
    return {"CXX": str(script), "CALLS": str(tmp_path / "calls")}


@pytest.fixture
def empty(tmp_path):
    (tmp_path / "empty.cpp").touch()
    return {"EMPTY": str(tmp_path / "empty.cpp")}


@pytest.mark.package
@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="no other processor has optional instruction sets")
def test_a_module_without_an_instruction_set_works_and_info_names_it(sources, compiler, tmp_path):
    crashes = r"MPLUG2_ISA=avx512_bf16 .*/attention\.cpp"
    wheel, output = build(sources, "wheel", **compiler, CRASHES=crashes, MPLUG2_FAST_NATIVE="required")
    assert "WITHOUT its kernels for avx512_bf16" in output
    # The rest was compiled for the sets that are there.
    last = [line for line in Path(compiler["CALLS"]).read_text().splitlines() if line.endswith("bind/module.cpp")][-1]
    assert set(re.findall(r"-DMPLUG2_WITHOUT_\w+", last)) == {"-DMPLUG2_WITHOUT_AVX512_BF16"}
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    path = {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "MPLUG2_FAST_NATIVE": "required"}
    info = json.loads(run(["-m", "mplug2_fast", "info", "--json"], tmp_path, **path))
    assert list(info["native"]["left_out"]) == ["avx512_bf16"]
    assert "Segmentation fault" in info["native"]["left_out"]["avx512_bf16"]
    code = "import torch; from mplug2_fast import ops, nn; print(nn.LayerNorm(8)(torch.ones(2, 8)).sum().item())"
    assert run(["-c", code], tmp_path, **path).split()[-1] == "0.0"


@pytest.mark.package
@pytest.mark.parametrize("crashes", [r"MPLUG2_ISA=portable .*/layer_norm\.cpp", r"bind/module\.cpp"])
def test_code_that_does_not_compile_at_all_stops_the_build(sources, compiler, empty, crashes):
    with pytest.raises(AssertionError, match="the native module of mplug2_fast does not build"):
        build(sources, "wheel", **compiler, **empty, CRASHES=crashes)


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
