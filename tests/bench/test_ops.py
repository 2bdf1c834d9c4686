"""Operators as cases of the benchmark, at small sizes."""

import math

import pytest
import torch

from bench.case import OURS
from bench.ops import cases, compiled
from bench.ops.bounds import BOUNDS
from bench.row import Selection
from mplug2_fast import ops


def key_of(name, sizes, direction="forward", dtype="float32"):
    selection = Selection("tiny", (dtype,), directions=(direction,), sizes=("edge",), only=(name,))
    return next(key for key in cases.keys(selection) if key.sizes == f"edge, {cases.described(sizes)}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "direction"),
    [
        (name, direction)
        for name, function in ops.OPERATORS.items()
        if "cpu" in function.op.spec.devices
        for direction in ("forward", "backward", "both")
        if direction == "forward" or function.op.spec.differentiable
    ],
)
def test_all_ways_of_all_operators_run_and_ours_is_right(name, direction, dtype):
    spec = ops.OPERATORS[name].op.spec
    case = cases.build(key_of(name, spec.edge_cases[1], direction, dtype), compile=False)
    agreement = case.agreement()
    assert agreement.ours <= agreement.allowed < math.inf
    assert case.flop > 0
    assert case.bytes > 0
    expected = {OURS, "eager", "torch"} | ({"reference"} if dtype == "bfloat16" else set())
    assert expected <= case.ways.keys()
    numbers = {way: len(calls()) for way, calls in case.ways.items()}
    assert len(set(numbers.values())) == 1
    for calls in case.ways.values():
        calls()[0]()


def test_gradients_of_differentiable_arguments():
    case = cases.build(key_of("layer_norm", ops.layer_norm.op.spec.edge_cases[1], "backward"), compile=False)
    gradients = case.ways[OURS]()[0]()
    assert [tuple(g.shape) for g in gradients] == [(2, 5, 7), (7,), (7,)]


def test_inputs_are_distant_and_share_weights():
    spec = ops.linear_act.op.spec
    first = spec.inputs(spec.edge_cases[1])
    others = cases.rotated(spec, first)
    assert len(others) == cases.MAX_INPUTS - 1
    assert all(other["weight"] is first["weight"] for other in others)
    assert len({other["x"].data_ptr() for other in [first, *others]}) == cases.MAX_INPUTS
    assert all(torch.equal(other["x"], first["x"]) for other in others)


def test_selected_sizes_and_directions():
    selection = Selection("large", ("float32", "bfloat16"), directions=("forward", "backward"), sizes=("large",))
    keys = cases.keys(selection)
    assert {key.sizes.split(",")[0] for key in keys} == {"large"}
    assert {key.direction for key in keys if key.name == "beam_step"} == {"forward"}
    assert {key.direction for key in keys if key.name == "mlp"} == {"forward", "backward"}
    assert len(keys) == len(set(keys))


def test_attention_by_each_gpu_kernel():
    op = ops.attention.op
    given = op.spec.inputs(op.spec.edge_cases[1])
    (*_, flash) = BOUNDS["attention"]
    assert flash.devices == ("cuda",)
    torch.testing.assert_close(flash.prepare(given)(), ops.attention(**given), equal_nan=True)


def test_the_peer_takes_the_operator_arguments():
    op = ops.linear_act.op
    given = op.spec.inputs(op.spec.edge_cases[1])
    peer = compiled.Peer(op.direct("torch"), given)
    torch.testing.assert_close(peer(*compiled.inputs(given)), ops.linear_act(**given))
