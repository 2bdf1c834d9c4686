"""Calls CMake for the native module and lists the packages; everything else is in pyproject.toml.

MPLUG2_FAST_NATIVE decides what happens on a machine that cannot build the native module, for want of a compiler,
CMake or Python's headers: "auto" (the default) installs the package without it, "required" stops the installation,
"off" never builds it. Native code that does not compile always stops the installation. What was done and why is left
in a file beside the package's modules, from which `mplug2-fast info` tells it.

MPLUG2_FAST_CUDA says the same of the module's kernels for GPUs, which need a CUDA compiler.
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
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds mplug2_fast._C with CMake, or leaves it out where the tools for it are missing."""

    def run(self) -> None:
        self.missing: str | None = None
        super().run()
        package = ROOT / "mplug2_fast" if self.inplace else Path(self.build_lib) / "mplug2_fast"
        package.mkdir(parents=True, exist_ok=True)
        report = {"built": self.missing is None, "reason": self.missing, "python": sys.version.split()[0]}
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
            line = "*" * 100
            self.warn(f"\n{line}\nmplug2_fast is installed WITHOUT its native module. {self.missing}\n{line}")
            return
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parent.parent
        for arguments in (["--build", build_dir, "--parallel"], ["--install", build_dir, "--prefix", prefix]):
            if subprocess.run(["cmake", *map(str, arguments)], check=False).returncode:
                raise CompileError("the native module of mplug2_fast does not build: see CMake's output above")


def policy(variable: str) -> str:
    """What the environment wants of an optional part: "auto", "required" or "off"."""
    found = os.environ.get(variable) or "auto"
    if found not in ("auto", "required", "off"):
        raise SetupError(f'{variable} is {found!r}: it must be "auto", "required" or "off"')
    return found


def configure(build_dir: Path, cuda: str) -> str | None:
    """Configures the native build; the reason when this machine's tools do not suffice.

    Args:
        build_dir: where to.
        cuda: the policy for kernels for GPUs.
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


setup(
    packages=[
        *find_packages(include=["mplug2_fast", "mplug2_fast.*"]),
        "mplug2_fast.kernels",
        *(f"mplug2_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    ext_modules=[Extension("mplug2_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
