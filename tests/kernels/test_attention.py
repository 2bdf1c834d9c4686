"""Attention's kernels in what the Large model does not ask for, and how a memory is split."""

import pytest
import torch
from torch import Tensor

from mplug2_fast import ops

pytest.importorskip("triton")

from bench.triton_resources import CAPABILITIES, SHARED_LIMIT, compiled
from mplug2_fast.kernels._launch import record
from mplug2_fast.kernels.beam_attention import _WAVES, part_length

VARIANTS = {
    "padded, causal": (ops.attention, {"batch": 2, "queries": 257, "keys": 257, "masked": True, "causal": True}),
    "128 channels": (ops.attention, {"batch": 2, "queries": 33, "keys": 257, "head_dim": 128, "masked": True}),
    "many beams": (ops.beam_attention, {"batch": 2, "queries": 40, "keys": 600, "head_dim": 128, "masked": True}),
}


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(each, marks=pytest.mark.soak) for each in CAPABILITIES if each != 90)]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_spills(variant: str, capability: int):
    operator, sizes = VARIANTS[variant]
    op = operator.op
    made = op.spec.inputs({"head_dim": 64, **sizes}, torch.bfloat16)
    given = op.arguments(*(value.to("meta") if isinstance(value, Tensor) else value for value in made.values()))
    backend = op.backends["triton"]
    with record(capability) as recorder:
        saved = op.derivatives.save(backend, given)
        if operator is ops.attention:  # whose backward kernels are the other's too
            backend.backward([torch.empty_like(saved[0])], given, saved, [True] * 3)
    assert recorder.launches
    for launch in recorder.launches:
        for config in launch.configs:
            found = compiled(launch, config, capability, disassembled=False)
            assert found.spilled == 0, f"{launch.kernel} for {capability} with {config}"
            assert found.shared <= SHARED_LIMIT[capability]


@pytest.mark.parametrize("k_len", [0, 1, 65, 257, 1100, 4097, 5000])
@pytest.mark.parametrize("programs", [1, 12, 16, 512])
def test_parts_fill_the_device_and_are_not_too_short(k_len, programs):
    length = part_length(k_len, programs, 132)
    parts = -(-k_len // length)
    assert length % 64 == 0
    assert parts <= 64
    assert parts * programs <= max(programs, _WAVES * 132)
    if parts > 1:
        assert length >= 128
        assert k_len < parts * (length + 64)
    if k_len >= 4097 and programs in (12, 16):
        assert parts * programs >= 2 * 132
