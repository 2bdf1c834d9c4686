"""`python -m tests.golden` on cases from elsewhere: correct ones, changed ones, and ones that cannot be read."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mplug2_fast as mf
from tests.golden.__main__ import KINDS, main
from tests.golden.cases import FOLDER, GoldenCase
from tests.golden.compare import absolute, compare, differing, frobenius, gradient, relative
from tests.golden.mplug2 import question_answering


@pytest.fixture(scope="module")
def computed():
    """Every quantity of `qa_a`, computed once for all tests."""
    return question_answering(GoldenCase("qa_a"), "fast")


@pytest.fixture
def case(tmp_path, monkeypatch, computed):
    """A folder elsewhere with a copy of `qa_a`."""
    for file in (FOLDER / "qa_a").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setitem(KINDS, "qa", lambda case, implementation: computed)
    return tmp_path


def run(folder, capsys):
    status = main([str(folder), "--implementation", "fast"])
    captured = capsys.readouterr()
    failed = [line.split()[1] for line in captured.out.splitlines() if line.startswith("FAILED")]
    return status, failed, captured.err


def change(folder, name, change_values):
    expected = dict(np.load(folder / "expected.npz"))
    change_values(expected) if name is None else change_values(expected[name])
    np.savez(folder / "expected.npz", **expected)


def test_command(tmp_path):
    """Runs from a relative path, with the configuration of a smaller search."""
    folder = tmp_path / "smaller"
    folder.mkdir()
    for file in (FOLDER / "caption_b").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    case = json.loads((folder / "case.json").read_text())
    case["config"] |= {"max_length": 3, "beam_size": 2}
    (folder / "case.json").write_text(json.dumps(case))
    root = FOLDER.parents[1]
    command = [sys.executable, "-m", "tests.golden", "tests/golden/caption_b", str(folder), "--implementation", "fast"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    summaries = [line for line in done.stdout.splitlines() if " failed" in line]
    assert summaries == ["15 quantities, 0 failed", "15 quantities, 2 failed: beam_ids, beam_scores"], done.stdout


def test_other_configuration(tmp_path, capsys):
    """A vision width that differs from the text width, halved frames, connected fusion layers."""
    case = json.loads((FOLDER / "qa_a" / "case.json").read_text())
    case["clip"] |= {"width": 64}
    case["config"] |= {"temporal_downsampling": True}
    case["bert"] |= {"fusion_layers": 3, "stride_layer": 1}
    config = mf.MPlug2Config.from_official(bert=case["bert"], model=case["config"], clip=case["clip"])
    parameters = mf.reference.MPlug2ForQuestionAnswering(config).official_parameters()
    case["keys"] = {key: list(value.shape) for key, value in parameters.items()}
    (tmp_path / "case.json").write_text(json.dumps(case))
    (tmp_path / "inputs.npz").write_bytes((FOLDER / "qa_a" / "inputs.npz").read_bytes())
    np.savez(tmp_path / "expected.npz", rank_ids=np.zeros((3, 6)))
    computed = question_answering(GoldenCase(tmp_path), "reference")
    assert "grad:visn_fc.weight" in computed
    stored = {name: value.detach() for name, value in computed.items() if not name.endswith("key.bias")}  # noise
    np.savez(tmp_path / "expected.npz", **stored)
    assert run(tmp_path, capsys) == (0, [], "")


def test_copy_of_a_case(case, capsys):
    assert run(case, capsys) == (0, [], "")
    assert main([str(case), str(case)]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if " failed" in line] == [
        "20 quantities, 0 failed"
    ] * 4


def test_every_changed_value_is_noticed(case, capsys):
    for name, values in np.load(case / "expected.npz").items():
        original = (case / "expected.npz").read_bytes()
        entry = np.unravel_index(values.size // 2, values.shape)
        spread = values.std() if values.size > 1 else abs(values)

        def alter(values, entry=entry, step=1 if values.dtype.kind == "i" else 0.02 * spread):
            values[entry] += step

        change(case, name, alter)
        assert run(case, capsys) == (1, [name], "")
        (case / "expected.npz").write_bytes(original)


@pytest.mark.parametrize("name", ["text", "rank_ids", "loss"])
def test_quantity_is_missing(case, capsys, name):
    change(case, None, lambda expected: expected.pop(name))
    assert run(case, capsys) == (1, [name], "")


def test_all_gradients_are_missing(case, capsys):
    change(case, None, lambda expected: [expected.pop(key) for key in list(expected) if key.startswith("grad:")])
    assert run(case, capsys) == (1, ["grad:"], "")


@pytest.mark.parametrize("name", ["sims", "grad:itm_head.weight"])
def test_quantity_that_nothing_computes(case, capsys, name):
    change(case, None, lambda expected: expected.update({name: np.zeros(3)}))
    assert run(case, capsys) == (1, [name], "")


@pytest.mark.parametrize("values", [np.zeros((3, 4)), np.zeros((3, 6), int), np.full((3, 6), np.nan), np.zeros((3, 0))])
def test_shape_type_and_values(case, capsys, values):
    change(case, None, lambda expected: expected.update(rank_probs=values))
    assert run(case, capsys) == (1, ["rank_probs"], "")


def damage_kind(folder: Path):
    case = json.loads((folder / "case.json").read_text())
    (folder / "case.json").write_text(json.dumps(case | {"kind": "poem"}))


def damage_key(folder: Path):
    case = json.loads((folder / "case.json").read_text())
    del case["seed"]
    (folder / "case.json").write_text(json.dumps(case))


DAMAGE = {
    "case.json has kind 'poem'; known kinds are": damage_kind,
    "case.json has no entry 'seed'": damage_key,
    "case.json cannot be read: No such file": lambda folder: (folder / "case.json").unlink(),
    "case.json is not JSON": lambda folder: (folder / "case.json").write_text("{"),
    "case.json must hold an object, got list": lambda folder: (folder / "case.json").write_text("[]"),
    "inputs.npz cannot be read: No such file": lambda folder: (folder / "inputs.npz").unlink(),
    "inputs.npz has no entry 'question_ids'": lambda folder: np.savez(folder / "inputs.npz", a=np.zeros(1)),
    "expected.npz cannot be read: No such file": lambda folder: (folder / "expected.npz").unlink(),
    "expected.npz is not a file of arrays": lambda folder: (folder / "expected.npz").write_bytes(b"PK\3\4"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_case_that_cannot_be_read(case, capsys, monkeypatch, message):
    monkeypatch.setitem(KINDS, "qa", question_answering)
    DAMAGE[message](case)
    status, failed, error = run(case, capsys)
    assert (status, failed, error.count("\n")) == (2, [], 1)
    assert message in error


def test_weights_that_do_not_fit(case, capsys, monkeypatch):
    monkeypatch.setitem(KINDS, "qa", question_answering)
    description = json.loads((case / "case.json").read_text())
    del description["keys"]["visn_emb_norm.bias"]
    (case / "case.json").write_text(json.dumps(description))
    status, failed, error = run(case, capsys)
    assert (status, failed) == (2, [])
    assert "visn_emb_norm.bias" in error


def test_measures():
    expected = torch.tensor([3.0, 4.0]).double()
    assert frobenius(expected * 1.1, expected) == pytest.approx(0.1)
    assert absolute(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.5)
    assert relative(expected * 1.1, expected) == pytest.approx(0.1)
    assert differing(expected + torch.tensor([0.0, 0.5]), expected) == 1
    many = torch.ones(10_000).double()
    one_wrong = many.clone()
    one_wrong[5] += 0.01
    assert frobenius(one_wrong, many) == pytest.approx(0.005)
    assert gradient(expected * 1.1, expected) == pytest.approx(0.1)
    assert gradient(expected * -1e-9, expected * 1e-9) < 1e-3
    assert gradient(expected * 1e-9, expected * 0) < 1e-3
    special = torch.tensor([torch.inf, torch.nan, 0.0]).double()
    for measure in (frobenius, absolute, relative, differing):
        assert measure(special, special) == 0
        assert measure(special + torch.tensor([0, 0, 0.1]), special) > 0.09
        (comparison,) = compare({"a": special}, {"a": torch.tensor([torch.inf, 1.0, 0.0])})
        assert not comparison.ok
