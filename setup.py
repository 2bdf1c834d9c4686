"""Calls CMake for the native module and lists the packages; everything else is in pyproject.toml.

MPLUG2_FAST_NATIVE decides what happens on a machine that cannot build the native module because a compiler, CMake or
Python's headers are missing: "auto" (the default) installs the package without it, "required" stops the installation,
"off" never builds it. The kernels of an instruction set that the compiler fails on are left out. Any other native code
that does not compile stops the installation. `_native_build.json`, beside the package's modules, records what was
built and why the rest was not; `mplug2-fast info` shows it.

MPLUG2_FAST_CUDA decides the same for the module's GPU kernels, which need a CUDA compiler.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).parent.resolve()
DOES_NOT_BUILD = "the native module of mplug2_fast does not build: see CMake's output above"


class FreshBuild(build_py):
    """Copies the modules into an empty folder: setuptools keeps whatever an earlier build left there."""

    def run(self) -> None:
        if not self.editable_mode:
            empty(Path(self.build_lib), Path(self.get_finalized_command("build").build_base))
        super().run()


class FreshWheel(bdist_wheel):
    """Collects the wheel in an empty folder: an interrupted build leaves its files behind."""

    def run(self) -> None:
        empty(Path(self.bdist_dir), Path(self.get_finalized_command("build").build_base))
        super().run()


class CMakeBuild(build_ext):
    """Builds mplug2_fast._C with CMake, or leaves it out where the tools for it are missing."""

    def run(self) -> None:
        self.missing: str | None = None
        self.left_out: dict[str, str] = {}
        super().run()
        package = ROOT / "mplug2_fast" if self.inplace else Path(self.build_lib) / "mplug2_fast"
        package.mkdir(parents=True, exist_ok=True)
        if self.missing:  # an earlier editable installation may have left it
            (package / Path(self.get_ext_filename("mplug2_fast._C")).name).unlink(missing_ok=True)
        report = {
            "built": self.missing is None,
            "reason": self.missing,
            "left_out": self.left_out,
            "python": sys.version.split()[0],
        }
        (package / "_native_build.json").write_text(json.dumps(report, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        native, cuda = policy("MPLUG2_FAST_NATIVE"), policy("MPLUG2_FAST_CUDA")
        build_dir = (Path(self.build_temp) / "cmake").resolve()
        self.missing = "It was turned off by MPLUG2_FAST_NATIVE." if native == "off" else configure(build_dir, cuda)
        for name, wanted in (("MPLUG2_FAST_NATIVE", native), ("MPLUG2_FAST_CUDA", cuda)):
            if self.missing and wanted == "required":
                raise SetupError(f"{name} is required, but the native module cannot be built. {self.missing}")
        if self.missing:
            ext.optional = True  # setuptools then does not look for its file
            self.emphasize(f"mplug2_fast is installed WITHOUT its native module. {self.missing}")
            return
        self.left_out = compile_kernels(build_dir)
        for name, reason in self.left_out.items():
            self.emphasize(f"mplug2_fast is installed WITHOUT its kernels for {name}. {reason}")
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parent.parent
        cmake("--install", build_dir, "--prefix", prefix)

    def emphasize(self, text: str) -> None:
        line = "*" * 100
        self.warn(f"\n{line}\n{text}\n{line}")


def empty(folder: Path, base: Path) -> None:
    """Removes what an earlier build of the package left in a folder; all of it, if the folder is ours, in `base`."""
    ours = base.resolve() in folder.resolve().parents
    stale = folder if ours else folder / "mplug2_fast"
    if stale.exists():
        shutil.rmtree(stale)


def policy(variable: str) -> str:
    """What the environment wants of an optional part: "auto", "required" or "off"."""
    found = os.environ.get(variable) or "auto"
    if found not in ("auto", "required", "off"):
        raise SetupError(f'{variable} is {found!r}: it must be "auto", "required" or "off"')
    return found


def configure(build_dir: Path, cuda: str) -> str | None:
    """Configures the native build. Returns the reason where this machine's tools do not suffice.

    Args:
        build_dir: where CMake writes.
        cuda: the policy for GPU kernels.
    """
    if shutil.which("cmake") is None:
        return "CMake is not installed."
    command = ["cmake", "-S", str(ROOT), "-B", str(build_dir), f"-DPython_EXECUTABLE={sys.executable}", "--fresh"]
    command.append(f"-DMPLUG2_CUDA={cuda}")
    if shutil.which("ninja"):
        command += ["-G", "Ninja"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="\n")
    if done.returncode == 0:
        return None
    # The text of the first error, without where in CMake's own files it arose.
    text = re.split(r"^CMake Error.*:$", done.stderr, maxsplit=1, flags=re.MULTILINE)[-1]
    text = re.split(r"^(?:Call Stack|CMake Error|-- )", text, maxsplit=1, flags=re.MULTILINE)[0]
    return "CMake could not configure it: " + " ".join(text.split())[:500]


def compile_kernels(build_dir: Path) -> dict[str, str]:
    """Compiles a configured build. Returns the optional kernels that the compiler failed on, with the reason."""
    if not build(build_dir):
        return {}
    optional = (build_dir / "optional_kernels.txt").read_text().split(";")
    errors = {name: build(build_dir, "--target", f"kernels_{name}") for name in optional if name}
    left_out = {name: error for name, error in errors.items() if error}
    if left_out:
        cmake(f"-DMPLUG2_LEFT_OUT={';'.join(left_out)}", build_dir)
    if not left_out or build(build_dir):
        raise CompileError(DOES_NOT_BUILD)
    return left_out


def build(build_dir: Path, *target: str) -> str | None:
    """Builds everything, or one target. Returns the compiler's first error, if any."""
    command = ["cmake", "--build", str(build_dir), "--parallel", *target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
    if process.returncode == 0:
        return None
    errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return f"The compiler failed: {(errors or lines or ['without a word'])[0][:500]}"


def cmake(*arguments: str | Path) -> None:
    if subprocess.run(["cmake", *map(str, arguments)], check=False).returncode:
        raise CompileError(DOES_NOT_BUILD)


setup(
    packages=[
        *find_packages(include=["mplug2_fast", "mplug2_fast.*"], exclude=["mplug2_fast.kernels*"]),
        "mplug2_fast.kernels",
        *(f"mplug2_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    ext_modules=[Extension("mplug2_fast._C", sources=[])],
    cmdclass={"build_py": FreshBuild, "build_ext": CMakeBuild, "bdist_wheel": FreshWheel},
)
