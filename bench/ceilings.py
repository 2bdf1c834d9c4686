"""What the machine can do: the best rate of a large matrix product per dtype and the bandwidth of a copy; and how close
a measurement comes to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.row import EIGHT_BIT, FP8, Key, Row

# (rows, inputs, outputs) of the Large model's vision encoder, 16 frames: the two products of an MLP, and the QKV.
LARGE_SHAPES = ((4112, 1024, 4096), (4112, 4096, 1024), (4112, 1024, 3072))
QUICK_SHAPES = ((1028, 1024, 4096),)
GPU_SHAPES = (*LARGE_SHAPES, (8192, 8192, 8192))


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a row's name."""
    return torch.float8_e4m3fn if name == FP8 else getattr(torch, name)


def measure(device: str, dtypes: list[str], *, quick: bool = False) -> dict[str, Any]:
    """For each dtype the best GEMM rate in GFLOP/s with its operator and shape; copy bandwidth in GB/s."""
    shapes = GPU_SHAPES if device.startswith("cuda") else QUICK_SHAPES if quick else LARGE_SHAPES
    # A GPU needs a while to raise its clocks.
    repeats, size = (30, 1 << 31) if device.startswith("cuda") else (2, 1 << 26) if quick else (4, 1 << 28)
    rates = {dtype: gemm(device, torch_dtype(dtype), shapes, repeats) for dtype in dtypes}
    return {"gemm": rates, "copy_gb_per_second": copy_bandwidth(device, size)}


def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The better of two measurements, part by part. On a shared machine each is a lower bound."""
    gemm = dict(first["gemm"])
    for dtype, rate in second["gemm"].items():
        if dtype not in gemm or rate["gflops"] > gemm[dtype]["gflops"]:
            gemm[dtype] = rate
    return {"gemm": gemm, "copy_gb_per_second": max(first["copy_gb_per_second"], second["copy_gb_per_second"])}


def gemm(device: str, dtype: torch.dtype, shapes: tuple[tuple[int, int, int], ...], repeats: int) -> dict[str, Any]:
    """The best over shapes, operators and repeats, on random data."""
    best: dict[str, Any] = {"gflops": 0.0}
    for rows, inputs, outputs in shapes:
        if dtype == torch.int8:
            ways = int8_operators(rows, inputs, outputs)
        elif dtype == torch.float8_e4m3fn:
            ways = {"_scaled_mm": fp8_operator(rows, inputs, outputs, device)}
        else:
            x = torch.randn(rows, inputs, device=device).to(dtype)
            weight = torch.randn(outputs, inputs, device=device).to(dtype)
            ways = operators(x, weight, torch.randn(outputs, device=device).to(dtype))
        for name, run in ways.items():
            seconds = timed(run, device)
            hopeless = device == "cpu" and 4 * rows * inputs * outputs / seconds / 1e9 < best["gflops"]
            if not hopeless:
                seconds = min(seconds, *(timed(run, device) for _ in range(repeats)))
            rate = 2 * rows * inputs * outputs / seconds / 1e9
            if rate > best["gflops"]:
                best = {"gflops": rate, "operator": name, "shape": [rows, inputs, outputs]}
    return best


def operators(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every way in which PyTorch computes a linear layer here."""
    transposed = weight.t().contiguous()
    ways: dict[str, Callable[[], Tensor]] = {}
    if x.device.type == "cpu" and x.dtype != torch.float32:  # faster where the CPU lacks instructions for the dtype
        wide = operators(x.float(), weight.float(), bias.float())
        ways |= {f"{name}, in float32": run for name, run in wide.items()}
    ways |= {"F.linear": lambda: F.linear(x, weight, bias), "matmul": lambda: x @ transposed}
    if x.device.type == "cpu" and onednn_has(x.dtype):
        linear = torch.ops.mkldnn._linear_pointwise
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        ways["oneDNN linear"] = lambda: linear(x, weight, bias, "none", [], "")
        ways["oneDNN linear, packed"] = lambda: linear(x, packed, bias, "none", [], "")
        ways["oneDNN linear with swish, packed"] = lambda: linear(x, packed, bias, "swish", [], "")
    return ways


def int8_operators(rows: int, inputs: int, outputs: int) -> dict[str, Callable[[], Tensor]]:
    """Every way in which PyTorch multiplies bytes on a CPU. Both operands are rounded in advance."""
    x = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    ways: dict[str, Callable[[], Tensor]] = {"_int_mm": lambda: torch._int_mm(x, weight.t())}
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.onednn.qlinear_prepack(weight, [rows, inputs])
        scales, zeros = torch.full((outputs,), 1e-3), torch.zeros(outputs, dtype=torch.int64)
        unsigned, dtype = (x.int() + 128).to(torch.uint8), torch.bfloat16
        rest = (packed, scales, zeros, None, 1.0, 0, dtype, "none", [], "")
        ways["oneDNN qlinear, packed"] = lambda: torch.ops.onednn.qlinear_pointwise(unsigned, 0.01, 128, *rest)
    return ways


def fp8_operator(rows: int, inputs: int, outputs: int, device: str) -> Callable[[], Tensor]:
    """PyTorch's product of e4m3 numbers, rounded in advance, with a scale for each row and output; bfloat16 out."""
    x, weight = (torch.randn(size, inputs, device=device).to(torch_dtype(FP8)) for size in (rows, outputs))
    scale, scales = torch.ones(rows, 1, device=device), torch.ones(1, outputs, device=device)
    return lambda: torch._scaled_mm(x, weight.t(), scale, scales, out_dtype=torch.bfloat16)


def onednn_has(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    checks = {
        torch.float32: lambda: True,
        torch.bfloat16: lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return checks[dtype]()


def copy_bandwidth(device: str, size: int) -> float:
    """GB/s of a copy of `size` bytes; read and written bytes both count."""
    source = torch.full((size,), 1, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(timed(lambda: target.copy_(source), device) for _ in range(5)) / 1e9


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3


class Place(NamedTuple):
    """A measurement under the ceilings. None: there is no arithmetic, no traffic, or no ceiling."""

    tflops: float | None
    gb_per_second: float | None
    percent_of_ceiling: float | None
    bound: str | None


def place(flop: int | None, bytes: int | None, seconds: float, dtype: str, ceilings: Mapping[str, Any]) -> Place:
    """The rates of a work and its share of the binding ceiling.

    Arithmetic takes at least its time at the GEMM ceiling, traffic at least its time at the copy's. The longer of the
    two binds.
    """
    gemm = ceilings.get("gemm", {}).get(dtype)
    least = {
        "compute": flop / gemm["gflops"] / 1e9 if flop and gemm else 0.0,
        "memory": bytes / ceilings["copy_gb_per_second"] / 1e9 if bytes else 0.0,
    }
    bound = max(least, key=least.__getitem__)
    return Place(
        flop / seconds / 1e12 if flop else None,
        bytes / seconds / 1e9 if bytes else None,
        100 * least[bound] / seconds if least[bound] else None,
        bound if least[bound] else None,
    )


def dtype_of(key: Key) -> str:
    """The dtype of a work's products."""
    return next((dtype for dtype in EIGHT_BIT if key.name.endswith(f"_{dtype}")), key.dtype)


def under(row: Row, ceilings: Mapping[str, Any]) -> Row:
    """The row, placed under these ceilings."""
    return replace(row, **place(row.flop, row.bytes, row.seconds, dtype_of(row.key), ceilings)._asdict())
