"""What importing the package needs, and that it works without its native module."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import mplug2_fast
from mplug2_fast import _native

ROOT = Path(mplug2_fast.__file__).parents[1]

# A finder that comes first and refuses every top-level package that is not in a list.
ONLY = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r} or name in {refused!r}:
            raise ModuleNotFoundError(f"{{name}} was refused", name=name)

sys.meta_path.insert(0, Refuse())
"""
OPTIONAL = ("av", "safetensors", "tokenizers", "typer", "rich", "click", "triton", "PIL", "scipy")


def run_python(code, refused=()):
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", ONLY.format(refused=tuple(refused)) + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )


def test_import_needs_torch_and_numpy_only():
    code = """
import mplug2_fast
from mplug2_fast import ops, MPlug2Config, video
try:
    mplug2_fast.load_video("clip.mp4")
except ImportError as error:
    print(error)
"""
    done = run_python(code, refused=OPTIONAL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reading video files needs PyAV: pip install av")
    assert done.stderr == ""


def test_import_alone_loads_nothing_else():
    done = run_python("import mplug2_fast\nprint(*(m for m in sys.modules if m.startswith('mplug2_fast')))")
    assert done.stdout.split() == ["mplug2_fast"]


def test_import_touches_neither_cuda_nor_triton():
    code = """
import sys
import torch
before = set(sys.modules)
import mplug2_fast.kernels
from mplug2_fast import cli, nn, ops, reference, video
from mplug2_fast.models import mplug2
from mplug2_fast import predict
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(torch.cuda.is_initialized(), sorted(loaded & {"triton", "apex", "flash_attn", "xformers"}))
"""
    done = run_python(code)
    assert done.stdout == "False []\n", done.stderr


def test_without_the_native_module_the_package_works_and_says_so():
    code = """
import torch
from mplug2_fast import ops, _native
frames = torch.zeros((1, 4, 4, 3), dtype=torch.uint8)
print(ops.preprocess_frames(frames, 2).shape, ops.preprocess_frames(frames, 2).shape)
assert _native.native() is None
print(_native.native_error())
"""
    done = run_python(code, refused=["mplug2_fast._C"])
    assert done.returncode == 0, done.stderr
    assert "torch.Size([3, 1, 2, 2]) torch.Size([3, 1, 2, 2])" in done.stdout
    assert "mplug2_fast._C is not available" in done.stdout
    assert "MPLUG2_FAST_NATIVE=required" in done.stdout
    assert done.stderr.count("RuntimeWarning: mplug2_fast runs on its PyTorch fallbacks") == 1


@pytest.fixture
def package_folder(tmp_path, monkeypatch):
    """`_native` of a package that is installed in an empty folder."""
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))

    def missing(name):
        raise ImportError(f"cannot import {name}: undefined symbol")

    monkeypatch.setattr(_native.importlib, "import_module", missing)
    _native._load.cache_clear()
    yield tmp_path
    _native._load.cache_clear()


def test_a_module_that_was_never_built(package_folder):
    assert _native.native() is None
    assert "never built here" in _native.native_error().reason
    assert _native.native_error().traceback == ""


def test_a_module_that_could_not_be_built(package_folder):
    (package_folder / "_native_build.json").write_text('{"built": false, "reason": "CMake is not installed."}')
    assert _native.native_error().reason == "CMake is not installed."


def test_a_module_that_does_not_load(package_folder):
    (package_folder / "_C.cpython-311-x86_64-linux-gnu.so").write_bytes(b"")
    error = _native.native_error()
    assert "cannot be loaded" in error.reason
    assert "undefined symbol" in error.reason
    assert "Traceback" in error.traceback
    assert "undefined symbol" in str(error)


def test_a_build_report_that_makes_no_sense(package_folder):
    (package_folder / "_native_build.json").write_text("{")
    assert "never built here" in _native.native_error().reason


def test_instruction_sets_that_were_left_out_are_told_with_the_reason(package_folder, monkeypatch):
    isas = {name: name for name in ("portable", "avx2", "avx512", "avx512_bf16")}
    module = SimpleNamespace(
        Isa=SimpleNamespace(__members__=isas), is_compiled=lambda isa: not isa.startswith("avx512")
    )
    monkeypatch.setattr(_native, "native", lambda: module)
    (package_folder / "_native_build.json").write_text('{"built": true, "left_out": {"avx512": "It crashed."}}')
    found = _native.left_out()
    assert found == {"avx512": "It crashed.", "avx512_bf16": "this processor's family does not have it"}


def test_the_native_module_tells_how_it_was_built(native_module):
    assert native_module.compiler
    assert native_module.openmp in (True, False)
