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


def expected(name: str, dtype: torch.dtype, capability: int) -> set[str]:
    """What is found among the instructions, in some configuration of some kernel."""
    if dtype != torch.bfloat16:
        return set()
    found = {"MMA"} if name in PRODUCTS else set()
    if name in DESCRIBED and capability >= 90:
        found |= {"UTMALDG", "HGMMA"} if capability == 90 else {"UTMALDG"}
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_spills(name: str, dtype: torch.dtype, capability: int):
    written, missing = RESULT.read_text(), expected(name, dtype, capability)
    for launch in launches(name, dtype, capability):
        for config in launch.configs:
            found = compiled(launch, config, capability, disassembled=bool(missing))
            what = f"{launch.kernel} for {capability} with {config}"
            assert found.spilled == 0, f"{what} spills {found.spilled} bytes a thread"
            assert found.shared <= SHARED_LIMIT[capability], f"{what} wants {found.shared} bytes of shared memory"
            assert f"| {launch.kernel} | " in written, "python -m bench.triton_resources writes it down"
            assert f"| {config} |" in written, "python -m bench.triton_resources writes it down"
            missing = {each for each in missing if not any(each in instruction for instruction in found.instructions)}
    assert not missing, "no kernel has these instructions"
