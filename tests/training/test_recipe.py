"""Recipes are checked before anything is loaded."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from mplug2_fast.errors import ConfigError
from mplug2_fast.training import load_recipe, make_recipe
from mplug2_fast.training.optimizer import learning_rate
from mplug2_fast.training.recipe import Schedule

RECIPE = """
out = "run"
steps = 5
[model]
checkpoint = "tiny"
[[sources]]
data = "train.jsonl"
task = "captioning"
[optimizer]
learning_rate = 1e-4
betas = [0.9, 0.98]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_defaults_are_the_official_fine_tuning(file):
    recipe = load_recipe(file)
    assert (recipe.optimizer.vision_learning_rate, recipe.optimizer.weight_decay) == (2e-6, 0.02)
    assert (recipe.schedule.warmup_steps, recipe.schedule.min_learning_rate) == (200, 1e-6)
    assert recipe.tasks == ["captioning"]


def test_changes_on_the_command_line(file):
    recipe = load_recipe(file, ["steps=7", "sources.0.batch_size=2", "model.checkpoint=other", "ema=0.5"])
    assert (recipe.steps, recipe.sources[0].batch_size, recipe.model.checkpoint, recipe.ema) == (7, 2, "other", 0.5)


def test_paths_are_relative_to_the_file(file):
    (file.parent / "tiny").mkdir()
    recipe = load_recipe(file)
    assert recipe.sources[0].data == str(file.parent / "train.jsonl")
    assert recipe.model.checkpoint == str(file.parent / "tiny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stepz=3", "unknown key stepz: did you mean steps?"),
        ("optimizer.learning_rat=3", "unknown key optimizer.learning_rat: did you mean learning_rate?"),
        ("sources.0.batchsize=3", "unknown key sources.0.batchsize: did you mean batch_size?"),
        ("steps=-1", "steps: Input should be greater than or equal to 0, got -1"),
        ("steps=many", "steps: Input should be a valid integer, got 'many'"),
        ("autocast=float16", "autocast: Input should be 'none' or 'bfloat16', got 'float16'"),
        ("model.preset=large", "model: give either checkpoint or preset"),
        ("sources.0.weight=[1.0, 2.0]", "sources.0: weight has 2 numbers and task 1 names"),
        ("sources.4.batch_size=3", "sources.4.batch_size: there is no such place in the recipe"),
        ("steps", "'steps' is not of the form key=value"),
    ],
)
def test_bad_values(file, change, message):
    with pytest.raises(ConfigError) as error:
        load_recipe(file, [change])
    assert message in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = ")
    with pytest.raises(ConfigError, match="not TOML"):
        load_recipe(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="out is missing; model is missing; sources is missing"):
        make_recipe({})


def test_learning_rates():
    schedule = Schedule(warmup_steps=4, min_learning_rate=0.1)
    rates = [learning_rate(1.0, schedule, step, 14) for step in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.55)
    assert rates[14] == pytest.approx(0.1)
    assert learning_rate(0.01, schedule, 14, 14) == 0.01


def test_the_schedule_of_mplug():
    """Stairs in the first epoch, also downwards; constant within each later epoch."""
    values = {"kind": "epochs", "warmup_steps": 400, "warmup_learning_rate": 1e-5, "steps_per_epoch": 1000}
    schedule = Schedule(**values, min_learning_rate=1e-6)

    def rates(base, *steps):
        return [learning_rate(base, schedule, step, 8000) for step in steps]

    assert rates(3e-5, 0, 99, 100, 250, 400, 999) == pytest.approx([1e-5, 1e-5, 1.5e-5, 2e-5, 3e-5, 3e-5])
    assert rates(5e-6, 0, 200, 400) == pytest.approx([1e-5, 7.5e-6, 5e-6])
    assert rates(3e-5, 1000, 1999) == pytest.approx([1e-6 + 2.9e-5 * (1 + math.cos(math.pi / 8)) / 2] * 2)
    with pytest.raises(ValidationError, match="steps_per_epoch goes with the schedule epochs"):
        Schedule(kind="epochs")
