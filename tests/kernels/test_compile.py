"""Every kernel compiles in every configuration for every supported GPU and spills no registers: the table that
`bench.triton_resources` writes shows it and is up to date. A few kernels are compiled here."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from bench.triton_resources import (
    CAPABILITIES,
    DTYPES,
    SHARED_LIMIT,
    Resources,
    capabilities,
    compiled,
    entry,
    launches,
    operators,
    ways,
    written,
)

# Operators whose products use tensor cores.
PRODUCTS = {"attention", "beam_attention", "linear_act", "local_temporal", "mlp"}
# Operators whose tiles the tensor memory accelerator loads.
DESCRIBED = {"linear_act", "mlp"}
# The kernels are optimised for this case.
MAIN = (torch.bfloat16, 90)
OTHERS = [way for way in itertools.product(DTYPES, CAPABILITIES) if way != MAIN]
# Compiled here: the first kernel of each operator, for MAIN and for one of the other cases.
SOME = [(name, *MAIN) for name in operators()]
SOME += [
    (name, *way)
    for name, way in zip(operators(), itertools.cycle(OTHERS), strict=False)
    if way[1] in capabilities(name)
]


def expected(name: str, dtype: torch.dtype, capability: int) -> set[str]:
    """Instructions that at least one configuration of one kernel has."""
    if dtype != torch.bfloat16:
        return set()
    found = {"MMA"} if name in PRODUCTS else set()
    if name in DESCRIBED and capability >= 90:
        found |= {"UTMALDG", "HGMMA"} if capability == 90 else {"UTMALDG"}
    if name == "linear_fp8":
        found |= {"UTMALDG", "QGMMA"} if capability == 90 else {"UTMALDG", "MMA"}
    return found


def assert_fits(found: Resources, capability: int, what: str) -> None:
    assert found.spilled == 0, f"{what} spills {found.spilled} bytes a thread"
    assert found.shared <= SHARED_LIMIT[capability], f"{what} needs {found.shared} bytes of shared memory"


def test_the_table_is_complete_and_up_to_date():
    table, unseen = written(), set(written())
    for name, dtype, capability in ways():
        missing = expected(name, dtype, capability)
        for launch in launches(name, dtype, capability):
            for config in launch.configs:
                what = entry(name, launch, dtype, capability, config)
                assert what in table, f"{what}is not in the table: run python -m bench.triton_resources"
                assert_fits(table[what], capability, what)
                missing = {each for each in missing if not any(each in found for found in table[what].instructions)}
                unseen.discard(what)
        assert not missing, f"no kernel of {name} in {dtype} for {capability} has these instructions"
    assert not unseen, "the table has kernels that no longer exist: run python -m bench.triton_resources"


@pytest.mark.parametrize(("name", "dtype", "capability"), SOME, ids=str)
def test_kernels_compile(name: str, dtype: torch.dtype, capability: int):
    launch = next(launches(name, dtype, capability))
    resources = compiled(launch, launch.configs[0], capability, disassembled=False)
    assert_fits(resources, capability, f"{launch.kernel} for {capability} with {launch.configs[0]}")


def test_e4m3_products_compile_for_the_first_gpus_that_have_them():
    product = next(each for each in launches("linear_fp8", torch.bfloat16, 89) if each.kernel == "linear_fp8_forward")
    found = compiled(product, product.configs[0], 89)
    assert found.spilled == 0
    assert found.instructions.keys() == {"QMMA"}
