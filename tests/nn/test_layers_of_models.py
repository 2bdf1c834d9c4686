"""Models call their layers as modules, so that hooks, FSDP2 and activation checkpointing work on each of them."""

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast.nn import TemporalBlock
from mplug2_fast.nn.bert_layer import BertEmbeddings, BertLayer
from tests.tiny import SMALL, random_text, random_video, randomise

VIDEO = random_video(SMALL, batch=2)
TEXT, ANSWERS = random_text(SMALL, 2, 6), random_text(SMALL, 3, 5, seed=1)
MODELS = {"captioning": mf.MPlug2ForCaptioning, "question_answering": mf.MPlug2ForQuestionAnswering}
ENCODERS = {"visual", "universal", "text", "fusion", "decoder"}
FOR_VIDEO = ("visual", "universal")


@pytest.fixture(params=MODELS)
def task(request):
    return request.param


@pytest.fixture
def model(task):
    return randomise(MODELS[task](SMALL))


def layers(model, *parts):
    """The names of all layers and encoders, or of those in some parts of the model."""
    kinds = (TemporalBlock, BertLayer, BertEmbeddings)
    names = [n for n, module in model.named_modules() if isinstance(module, kinds) or n in ENCODERS]
    return {name for name in names if not parts or name.split(".")[0] in parts}


@pytest.fixture
def calls(model):
    """Collects the names of the layers and encoders that are called."""
    called = []
    for name in layers(model):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    return called


def test_training_calls_every_layer(model, task, calls):
    model.train()
    answers = () if task == "captioning" else (*ANSWERS, [1, 2], torch.ones(3))
    model(VIDEO, *TEXT, *answers).backward()
    assert set(calls) == layers(model)


def test_encoding_a_video_calls_every_layer(model, calls):
    with torch.no_grad():
        model.encode_video(VIDEO)
    assert set(calls) == layers(model, *FOR_VIDEO)


def test_generation_calls_every_layer(model, task, calls):
    questions = {} if task == "captioning" else {"question_ids": TEXT[0], "question_mask": TEXT[1]}
    model.generate(VIDEO, num_beams=2, max_length=4, min_length=4, **questions)
    assert set(calls) == layers(model)
    steps = [name for name in calls if name == "decoder.layers.1"]
    assert len(steps) == 4
