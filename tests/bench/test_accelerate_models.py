"""Models of other packages before and after `accelerate`: what is measured, and the verdict."""

from collections import Counter

import pytest

from bench import accelerate_models as models
from bench.accelerate_models import SERVED, Result, Subject
from mplug2_fast.ops.runtime import cpu


def result(*, fast: float, again: float = 1.0, error: float = 0.0) -> Result:
    turns = tuple((1.0 + noise, fast, again + noise) for noise in (0.0, 0.001, 0.0, -0.001, 0.0, 0.0, 0.001, 0.0, 0.0))
    return Result("model", turns, Counter({SERVED: 3}), error, 1e-5)


def test_a_model_is_slower_if_it_leaves_the_scatter_of_the_originals():
    assert not result(fast=1.0).is_slower
    assert not result(fast=1.04, again=0.95).is_slower
    assert result(fast=1.04).is_slower
    assert result(fast=0.5).ratio == pytest.approx(2.0)


def test_the_table_marks_wrong_and_slower_models():
    assert models.line(result(fast=0.5)).startswith("| model | 1000.0 | 2.00× |")
    assert "slower" in models.line(result(fast=1.1))
    assert "wrong: 1.0e-02" in models.line(result(fast=0.5, error=1e-2))


def test_names_differ():
    names = [subject.name for subject in models.subjects()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_small_model(monkeypatch, dtype):
    if dtype == "int8" and not cpu.multiplies_bytes():
        pytest.skip("8-bit weights need a processor that multiplies bytes")
    pytest.importorskip("transformers", minversion="5")
    monkeypatch.setattr(models, "LAYERS", 1)
    monkeypatch.setattr(models, "NEW_TOKENS", 2)
    monkeypatch.setattr(models, "FEWEST_TURNS", 2)
    for make in (models.bert, models.bert_lm):
        found = models.measure(Subject("small", "transformers", lambda make=make: make(64)), dtype, seconds=0)
        assert found.is_right
        assert len(found.seconds) == 2
        assert (found.ratio_to_float32 is not None) == (dtype == "int8")
        assert models.line(found).count("|") == len(models.INT8_HEADER[0].split("|")) - 1 or dtype != "int8"
        assert found.calls.total() > 0


def test_an_unknown_name(capsys):
    with pytest.raises(SystemExit):
        models.main(["no such model"])
    assert "no model has such a name: choose from BERT" in capsys.readouterr().err
