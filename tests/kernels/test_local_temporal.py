"""The local temporal module's kernels for more rows than one Large video has."""

import pytest
import torch
from torch import Tensor

from mplug2_fast import ops

pytest.importorskip("triton")

from bench.triton_resources import CAPABILITIES, SHARED_LIMIT, compiled
from mplug2_fast.kernels._launch import record


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_spills(capability: int):
    op = ops.local_temporal.op
    made = op.spec.inputs({**op.spec.models["large"], "batch": 2}, torch.bfloat16)
    given = tuple(value.to("meta") if isinstance(value, Tensor) else value for value in made.values())
    with record(capability) as recorder:
        op.backends["triton"].run(*given)
    launches = [launch for launch in recorder.launches if launch.kernel == "local_temporal_convolve"]
    assert launches
    for launch in launches:
        for config in launch.configs:
            found = compiled(launch, config, capability)
            assert found.spilled == 0, f"{launch.kernel} for {capability} with {config}"
            assert found.shared <= SHARED_LIMIT[capability]
