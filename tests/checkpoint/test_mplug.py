"""Files of mPLUG in every format that official and related programs write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mplug2_fast as mf
from mplug2_fast.checkpoint import convert, from_pretrained, inspect
from mplug2_fast.errors import CheckpointError
from tests.golden.cases import GoldenCase

Weights = dict[str, Tensor]
QUERY = "fusion_encoder.encoder.layer.3.attention.self.query.weight"


def config_of(name: str) -> mf.MPlugConfig:
    case = GoldenCase(name).description
    return mf.MPlugConfig.from_official(bert=case["bert"], model=case["config"], clip=case["clip"])


@pytest.fixture(scope="module")
def weights() -> Weights:
    """The state dict of a model for video, which has the modules of every task."""
    return GoldenCase("mplug_video").state_dict


@pytest.fixture(scope="module")
def config() -> mf.MPlugConfig:
    return config_of("mplug_video")


def pretraining(weights: Weights, fusion: str) -> Weights:
    """The names of pre-trained files: each encoder is inside a module with a head."""
    renamed = {}
    for key, value in weights.items():
        key = re.sub(r"^(text_encoder)\.(embeddings|encoder)\.", r"\1.bert.\2.", key)
        renamed[re.sub(r"^(fusion_encoder)\.(embeddings|encoder)\.", rf"\1.{fusion}.\2.", key)] = value
    return renamed | {f"{part}.cls.predictions.bias": torch.zeros(400) for part in ("text_encoder", "fusion_encoder")}


def save(form: str, weights: Weights, folder: Path) -> Path:
    """The weights in a form that a program writes."""
    path = folder / "weights.pth"
    if form == "official":
        torch.save({"model": weights, "optimizer": {}, "epoch": 3}, path)
    elif form.startswith("pre-training"):
        torch.save({"model": pretraining(weights, form.rpartition(" ")[2])}, path)
    elif form == "ModelScope":
        torch.save({f"model.{key}": value for key, value in weights.items()}, path)
    else:
        path = folder / "saved"
        (path / "3").mkdir(parents=True)
        (path / "latest").write_text("3\n")
        bf16 = {key: value.bfloat16() if value.is_floating_point() else value for key, value in weights.items()}
        torch.save({"module": bf16, "optimizer": None}, path / "3" / "mp_rank_00_model_states.pt")
    return path


@pytest.mark.parametrize("form", ["official", "pre-training bert", "pre-training fusion", "ModelScope", "DeepSpeed"])
def test_every_form_gives_the_same_model(form: str, weights: Weights, config: mf.MPlugConfig, tmp_path: Path) -> None:
    path, tasks = save(form, weights, tmp_path), ["question_answering", "retrieval"]
    found = inspect(path, task=tasks, config=config)
    assert (found.family, found.problem) == ("mPLUG", None)
    assert set(found.servable) == {name for name, task in mf.tasks.TASKS.items() if config.has_modules_for(task)}
    model = from_pretrained(convert(path, tmp_path / "converted", task=tasks, config=config))
    for key, value in model.official_parameters().items():
        expected = weights[key].bfloat16().float() if form == "DeepSpeed" else weights[key]
        assert torch.equal(value, expected), key


def test_weights_in_several_files(weights: Weights, tmp_path: Path) -> None:
    path = save("DeepSpeed", weights, tmp_path)
    (path / "3" / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(CheckpointError, match="the weights are split over 2 files"):
        from_pretrained(path)


def test_another_image_size(weights: Weights, config: mf.MPlugConfig, tmp_path: Path) -> None:
    path = save("official", weights, tmp_path)
    model = from_pretrained(path, "captioning", config=config.replace(image_size=70))
    expected = mf.MPlug(config.replace(image_size=70), ["captioning"])
    mf.load_official(expected, weights)
    assert torch.equal(model.visual.positional_embedding, expected.visual.positional_embedding)
    assert model.visual.positional_embedding.shape == (26, 192)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({QUERY: None}, [r"missing: 1 entry", rf"{QUERY} \[128, 128\]"]),
        ({QUERY: torch.zeros(128, 64)}, [r"of another shape: 1 entry", rf"{QUERY} \[128, 64\], needed \[128, 128\]"]),
        ({"more.weight": torch.zeros(2)}, [r"unexpected: 1 entry", r"more\.weight"]),
    ],
)
def test_entries_that_do_not_fit_are_named(
    change: dict[str, Tensor | None], named: list[str], weights: Weights, config: mf.MPlugConfig, tmp_path: Path
) -> None:
    changed = {key: value for key, value in {**weights, **change}.items() if value is not None}
    path = save("official", changed, tmp_path)
    problem = inspect(path, task="question_answering", config=config).problem
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(path, "question_answering", config=config)
    assert str(caught.value) == problem
    for pattern in named:
        assert re.search(pattern, problem)


GENERATES = {"captioning", "question_answering", "answer_ranking", "grounding", "text_generation"}


@pytest.mark.parametrize(
    ("name", "task", "servable"),
    [
        ("mplug_grounding", "grounding", GENERATES),
        ("mplug_retrieval", "retrieval", {"retrieval"}),
        ("mplug_vqa", "question_answering", GENERATES),
    ],
)
def test_files_name_their_task(name: str, task: str, servable: set[str], tmp_path: Path) -> None:
    path = save("official", GoldenCase(name).state_dict, tmp_path)
    found = inspect(path, config=config_of(name))
    assert (found.task, set(found.servable), found.problem) == (task, servable, None)
