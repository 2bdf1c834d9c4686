"""Every kernel in every configuration compiles for every GPU that it is for, and spills nothing."""

import pytest
import torch

from mplug2_fast import ops

pytest.importorskip("triton")

from bench.triton_resources import CAPABILITIES, DTYPES, RESULT, SHARED_LIMIT, compiled, launches

NAMES = [name for name, function in ops.OPERATORS.items() if "triton" in function.op.backends]
# Those whose products belong on tensor cores.
PRODUCTS = {"attention", "beam_attention", "linear_act", "local_temporal", "mlp"}
# Those whose tiles the tensor memory accelerator moves.
DESCRIBED = {"linear_act", "mlp"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_spills(name: str, dtype: torch.dtype, capability: int):
    written, instructions = RESULT.read_text(), set()
    for launch in launches(name, dtype, capability):
        for config in launch.configs:
            found = compiled(launch, config, capability)
            what = f"{launch.kernel} for {capability} with {config}"
            assert found.spilled == 0, f"{what} spills {found.spilled} bytes a thread"
            assert found.shared <= SHARED_LIMIT[capability], f"{what} wants {found.shared} bytes of shared memory"
            assert f"| {launch.kernel} | " in written, "python -m bench.triton_resources writes it down"
            assert f"| {config} |" in written, "python -m bench.triton_resources writes it down"
            instructions |= found.instructions.keys()
    if name in PRODUCTS and dtype == torch.bfloat16:
        assert any("MMA" in instruction for instruction in instructions), "no tensor-core instruction"
    if name in DESCRIBED and dtype == torch.bfloat16 and capability >= 90:
        assert "UTMALDG" in instructions
    if name in DESCRIBED and dtype == torch.bfloat16 and capability == 90:
        assert "HGMMA" in instructions
