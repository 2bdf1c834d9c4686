"""The benchmark of single operators, at sizes that take no time."""

import dataclasses
import importlib

import pytest
import torch

from bench.ops import cli, compiled, measure, table
from mplug2_fast import ops


@pytest.fixture
def small(monkeypatch):
    """The smallest sizes in place of the model's."""
    for function in ops.OPERATORS.values():
        spec = function.op.spec
        monkeypatch.setattr(function.op, "spec", dataclasses.replace(spec, models={"large": spec.awkward[1]}))
    monkeypatch.setattr(measure, "SECONDS", 0.01)


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_every_operator_has_a_row(name, small, native_module):
    row = measure.measure(name, "large", torch.float32, compile=False)
    assert (row.op, row.sizes, row.dtype, row.backend) == (name, "large", "float32", "cpu")
    assert row.milliseconds > 0
    assert row.relative_error < 1e-5
    assert row.x_compiled is None
    assert (row.baseline is None) == (row.x_baseline is None)
    shown = [cell(dataclasses.asdict(row)) for cell in table.COLUMNS.values()]
    assert all(isinstance(text, str) and text for text in shown)


def test_every_operator_has_its_file():
    for name in ops.OPERATORS:
        assert isinstance(importlib.import_module(f"bench.ops.{name}").BASELINES, tuple)


def test_targets_are_judged():
    module = importlib.import_module("bench.ops.local_temporal")
    ratio = {"eager": 3.5, "compiled": 1.1}
    assert list(measure.targets(module, torch.float32, ratio)) == ["≥ 3× eager: met", "≥ 1.2× compiled: missed"]


def test_the_peer_takes_the_operators_arguments(small):
    op = ops.linear_act.op
    given = op.spec.inputs(op.spec.awkward[1])
    peer = compiled.Peer(op.backends["torch"].run, given)
    torch.testing.assert_close(peer(*compiled.inputs(given)), ops.linear_act(**given))


def test_names_that_do_not_exist(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--ops", "softmax"])
    assert "no such choice 'softmax': choose from" in capsys.readouterr().err
