"""The GPU resources of each Triton kernel, found without a GPU: all configurations are compiled ahead of time for the
sizes of the Large model and a few others.

    python -m bench.triton_resources          # writes bench/results/triton_resources.md

Registers, shared memory, spills and tensor-core instructions come from the machine code. A row is kept until its digest
says that its code has changed, and a test reports outdated rows.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from mplug2_fast import ops
from mplug2_fast.kernels._launch import Launch, Tiles, record
from mplug2_fast.kernels._tuning import Config
from mplug2_fast.kernels.linear_fp8 import MIN_CAPABILITY

RESULT = Path(__file__).parent / "results" / "triton_resources.md"
CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes per program (CUDA C++ Programming Guide, technical specifications per compute capability)."""
DTYPES = (torch.bfloat16, torch.float32)
OTHER_SIZES: dict[str, list[dict[str, int | bool]]] = {
    "attention": [
        {"batch": 2, "queries": 257, "keys": 257, "head_dim": 64, "masked": True, "causal": True},
        {"batch": 2, "queries": 33, "keys": 257, "head_dim": 128, "masked": True},
    ],
    "beam_attention": [{"batch": 2, "queries": 40, "keys": 600, "head_dim": 128, "masked": True}],
}
"""Sizes that use kernels in other ways than the Large model does: padded and causal, 128 channels, many beams. Only for
16 bits, because heads of 128 channels spill in float32."""

_TENSOR_CORE = re.compile(r"\b(HMMA|QMMA|HGMMA|QGMMA|IMMA|UTC[A-Z]*MMA|UTMALDG)\b")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Resources:
    """shared: bytes per program. spilled: bytes per thread. instructions: name -> count in the machine code, if it was
    disassembled."""

    registers: int
    shared: int
    spilled: int
    instructions: dict[str, int]


def operators() -> list[str]:
    """The operators with their own Triton kernels. Composed operators use the kernels of others."""
    found = {name: function.op.backends for name, function in ops.OPERATORS.items()}
    return [
        name
        for name, backends in found.items()
        if "triton" in backends and backends["triton"].run is not backends["torch"].run
    ]


def capabilities(name: str) -> list[int]:
    """The compute capabilities for which an operator's kernels are compiled."""
    least = MIN_CAPABILITY if name == "linear_fp8" else 0
    return [capability for capability in CAPABILITIES if capability >= least]


def ways() -> Iterator[tuple[str, torch.dtype, int]]:
    """Each operator, dtype and compute capability in the table."""
    for name, dtype in itertools.product(operators(), DTYPES):
        yield from ((name, dtype, capability) for capability in capabilities(name))


def launches(name: str, dtype: torch.dtype, capability: int) -> Iterator[Launch]:
    """The launches of an operator, forward and backward, at the sizes of the Large model and at `OTHER_SIZES`; each
    kernel once."""
    op = ops.OPERATORS[name].op
    backend, seen = op.backends["triton"], set()
    large = [sizes for label, sizes in op.spec.models.items() if label.startswith("large")]
    others = OTHER_SIZES.get(name, []) if dtype.itemsize == 2 else []
    for sizes in large + others:
        with torch.device("meta"):  # random numbers too
            given = op.arguments(**op.spec.inputs(sizes, dtype, "meta"))
        with record(capability) as recorder:
            results = backend.run(given)
            if backend.backward is not None:
                saved = op.derivatives.save(backend, given)
                grads = [torch.empty_like(r) for r in (results if isinstance(results, tuple) else (results,))]
                backend.backward(grads, given, saved, [isinstance(given[i], Tensor) for i in op.derivatives.wanted])
        for launch in recorder.launches:
            signature, constants, _ = _signature(launch, launch.configs[0])
            if (what := (launch.kernel, str(signature), str(constants))) not in seen:
                seen.add(what)
                yield launch


def compiled(launch: Launch, config: Config, capability: int, *, disassembled: bool = True) -> Resources:
    """The resources of one configuration, compiled as for these arguments. Disassembling takes half as long as
    compiling."""
    signature, constants, attributes = _signature(launch, config)
    source = triton.compiler.ASTSource(launch.function, signature, constants, attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _USAGE.search(_cuobjdump("-res-usage", file.name))
        products = disassembled and "mma" in kernel.asm["ptx"]  # other kernels have no such instructions
        found = _TENSOR_CORE.findall(_cuobjdump("-sass", file.name)) if products else []
    assert usage is not None, "cuobjdump printed no resources"
    registers, stack, local = map(int, usage.groups())
    instructions = {name: found.count(name) for name in sorted(set(found))}
    return Resources(registers, kernel.metadata.shared, stack + local, instructions)


def _cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def entry(name: str, launch: Launch, dtype: torch.dtype, capability: int, config: Config) -> str:
    """The start of a configuration's line, with a digest of everything that is compiled."""
    text = f"{_text(launch.function)}{_signature(launch, config)}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"| {name} | {launch.kernel} | {_scalar(dtype)} | {capability} | {config} | {digest} | "


@functools.cache
def _text(function: Any) -> str:
    """The code of a kernel and of our functions and constants that it names."""
    text, known = code(inspect.getsource(function.fn)), function.fn.__globals__
    for value in (known[name] for name in sorted(function.fn.__code__.co_names) if name in known):
        if isinstance(value, triton.JITFunction):
            text += _text(value) if value.fn.__module__.startswith("mplug2_fast.") else ""
        elif isinstance(value, (triton.language.constexpr, int, float, str)):
            text += f"{value}\n"
    return text


def code(source: str) -> str:
    """Python source without comments, docstrings and layout."""
    kept: list[str] = []
    begins = True  # a statement
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            kept.append("{" if token.type == tokenize.INDENT else "}")
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE):
            if token.type != tokenize.STRING or not begins:
                kept.append(token.string)
            begins = False
        begins = begins or token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return " ".join(kept)


def written() -> dict[str, Resources]:
    """The table: entry -> resources."""
    lines = RESULT.read_text().splitlines() if RESULT.exists() else []
    matches = (re.match(r"((?:\| [^|]+ ){6}\| )(\d+) \| (.+) \| (\d+) \| (.+) \|$", line) for line in lines)
    return {
        begin: Resources(int(registers), round(float(shared) * 1024), int(spilled), _counts(instructions))
        for begin, registers, shared, spilled, instructions in (match.groups() for match in matches if match)
    }


def _counts(instructions: str) -> dict[str, int]:
    pairs = (words.split() for words in instructions.split(", ") if words != "–")
    return {name: int(count) for name, count in pairs}


def _signature(launch: Launch, config: Config) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[Any, Any]]:
    """Types, constants and divisibilities of the arguments, as Triton finds them at run time."""
    types, constants, attributes = {}, {}, {}
    given = {**launch.arguments, **launch.constants, **config.constants}
    for index, name in enumerate(launch.function.arg_names):
        value = given[name]
        types[name] = _type(value, given) if name in launch.arguments else "constexpr"
        if types[name] == "constexpr":
            constants[(index,)] = value
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def _type(value: Any, constants: dict[str, Any]) -> str:
    if isinstance(value, Tensor):
        return f"*{_scalar(value.dtype)}"
    if isinstance(value, Tiles):
        return f"tensordesc<{_scalar(value.tensor.dtype)}{value.block_shape(constants)}>"
    if value is None or (value == 1 and isinstance(value, int) and not isinstance(value, bool)):
        return "constexpr"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _scalar(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    special = {"bool": "i1", "uint8": "u8", "bfloat16": "bf16", "float8_e4m3fn": "fp8e4nv"}
    return special.get(name) or name.replace("float", "fp").replace("int", "i")


def rows(kept: Mapping[str, Resources]) -> Iterator[str]:
    """The lines of the table. One process per core compiles rows that are not kept."""
    # Not "fork": a fork keeps the environment from before the guard marked it.
    with multiprocessing.get_context("forkserver").Pool() as pool:  # leaving it ends its processes at once
        for found in pool.imap(functools.partial(_rows, kept), ways()):
            yield from found


def _rows(kept: Mapping[str, Resources], work: tuple[str, torch.dtype, int]) -> list[str]:
    made = []
    name, dtype, capability = work
    for launch in launches(name, dtype, capability):
        for config in launch.configs:
            begin = entry(name, launch, dtype, capability, config)
            found = kept.get(begin) or compiled(launch, config, capability)
            instructions = ", ".join(f"{n} {count}" for n, count in found.instructions.items()) or "–"
            made.append(f"{begin}{found.registers} | {found.shared / 1024:.1f} | {found.spilled} | {instructions} |")
    return made


def main() -> int:
    compiler = f"Compiled ahead of time by Triton {triton.__version__}, "
    kept = written() if RESULT.exists() and compiler in RESULT.read_text() else {}
    lines = [
        "# GPU resources of the Triton kernels",
        "",
        f"{compiler}for the sizes of the Large model and a few others. The digest covers the compiled source. "
        "Registers and spilled bytes are per thread, shared memory (KiB) is per program. HMMA, HGMMA and QGMMA, and "
        "UTC…MMA are tensor-core instructions of compute capability 8.0, 9.0 and 10.0; UTMALDG are loads by the tensor "
        "memory accelerator.",
        "",
        "| operator | kernel | dtype | for | configuration | digest | registers | shared | spilled | instructions |",
        "| --- | --- | --- | ---: | --- | --- | ---: | ---: | ---: | --- |",
    ]
    RESULT.write_text("\n".join([*lines, *rows(kept)]) + "\n")
    print(f"wrote {RESULT}")
    return 0


if __name__ == "__main__":
    from bench import guard

    sys.exit(guard.run(main))
