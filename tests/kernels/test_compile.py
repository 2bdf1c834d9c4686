"""Every kernel in every configuration compiles for every GPU that it is for, and spills nothing: so says a table, which
is of the kernels as they are. Some are compiled here."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from bench.triton_resources import (
    CAPABILITIES,
    DTYPES,
    SHARED_LIMIT,
    Resources,
    compiled,
    entry,
    launches,
    operators,
    written,
)

# Those whose products belong on tensor cores.
PRODUCTS = {"attention", "beam_attention", "linear_act", "local_temporal", "mlp"}
# Those whose tiles the tensor memory accelerator moves.
DESCRIBED = {"linear_act", "mlp"}
EVERY = list(itertools.product(operators(), DTYPES, CAPABILITIES))
# The GPU that kernels are made for.
MAIN = (torch.bfloat16, 90)
OTHERS = [way for way in itertools.product(DTYPES, CAPABILITIES) if way != MAIN]
# What is compiled here: every kernel for MAIN, and the first of an operator in one of the other ways.
SOME = [(name, *MAIN) for name in operators()]
SOME += [(name, *way) for name, way in zip(operators(), itertools.cycle(OTHERS), strict=False)]


def expected(name: str, dtype: torch.dtype, capability: int) -> set[str]:
    """What is found among the instructions, in some configuration of some kernel."""
    if dtype != torch.bfloat16:
        return set()
    found = {"MMA"} if name in PRODUCTS else set()
    if name in DESCRIBED and capability >= 90:
        found |= {"UTMALDG", "HGMMA"} if capability == 90 else {"UTMALDG"}
    return found


def assert_fits(found: Resources, capability: int, what: str) -> None:
    assert found.spilled == 0, f"{what} spills {found.spilled} bytes a thread"
    assert found.shared <= SHARED_LIMIT[capability], f"{what} wants {found.shared} bytes of shared memory"


def test_the_table_is_of_these_kernels():
    table, unseen = written(), set(written())
    for name, dtype, capability in EVERY:
        missing = expected(name, dtype, capability)
        for launch in launches(name, dtype, capability):
            for config in launch.configs:
                what = entry(name, launch, dtype, capability, config)
                assert what in table, f"{what}has changed: run python -m bench.triton_resources"
                assert_fits(table[what], capability, what)
                missing = {each for each in missing if not any(each in found for found in table[what].instructions)}
                unseen.discard(what)
        assert not missing, f"no kernel of {name} in {dtype} for {capability} has these instructions"
    assert not unseen, "there are no such kernels any more: run python -m bench.triton_resources"


@pytest.mark.parametrize(("name", "dtype", "capability"), SOME, ids=str)
def test_they_compile(name: str, dtype: torch.dtype, capability: int):
    """In their first configuration."""
    found = list(launches(name, dtype, capability))
    for launch in found if (dtype, capability) == MAIN else found[:1]:
        resources = compiled(launch, launch.configs[0], capability, disassembled=False)
        assert_fits(resources, capability, f"{launch.kernel} for {capability} with {launch.configs[0]}")
