"""Steps of the trainer are those of the official code: losses, gradients, AdamW with its groups and both rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mplug2_fast.tasks import get
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import Trainer
from mplug2_fast.training.data import Batch, Step
from tests.golden.cases import GoldenCase
from tests.golden.mplug2 import build
from tests.tolerance import relative
from tests.training.conftest import VOCABULARY
from tests.training.data import Noise

STEPS = 5
CASES = {
    "caption_b": ("captioning", "MPlug2ForCaptioning", ("caption_ids", "caption_mask")),
    "qa_a": (
        "question_answering",
        "MPlug2ForQuestionAnswering",
        ("question_ids", "question_mask", "answer_ids", "answer_mask", "answers_per_question", "answer_weights"),
    ),
}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def official_steps(model, video, inputs):
    """Five steps as the official scripts make them. Yields the loss before each."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = "bias" not in name and "LayerNorm.weight" not in name
        groups.setdefault((name.startswith("visual_encoder"), decays), []).append(parameter)
    rates = {True: 5e-4, False: 1e-3}
    optimizer = torch.optim.AdamW(
        [
            {"params": group, "lr": rates[vision], "rate": rates[vision], "weight_decay": 0.02 * decays}
            for (vision, decays), group in groups.items()
        ]
    )
    for step in range(STEPS):
        for group in optimizer.param_groups:
            share = (step + 1) / 3 if step < 3 else 1.0
            cosine = 1e-6 + (group["rate"] - 1e-6) * 0.5 * (1 + math.cos(math.pi * (step - 3) / (12 - 3)))
            group["lr"] = group["rate"] * share if step < 3 else cosine
        optimizer.zero_grad()
        loss = model(video, *inputs)
        loss.backward()
        yield loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("name", CASES)
def test_five_steps(name, recipe):
    task, class_name, inputs = CASES[name]
    case = GoldenCase(name)
    fast, reference = (without_dropout(build(case, kind, class_name)) for kind in ("fast", "reference"))
    given = [case.inputs[key] for key in inputs]
    tensors = {"video": case.video, **dict(zip(inputs, given, strict=True))}
    batch = Batch({task: tensors}, {task: get(task).targets(tensors, fast.config)}, [])
    plan = recipe(sources=[{"data": "x:X", "task": task, "batch_size": 1}], steps=12)
    tokenizer = Tokenizer.from_vocab(VOCABULARY)
    trainer = Trainer(plan, model=fast, tokenizer=tokenizer, datasets=[Noise(fast.config)])
    trainer.prepare()
    expected = list(official_steps(reference, case.video, given))
    losses = [trainer.step({0: Step([batch], {})})[task] for _ in range(STEPS)]
    assert losses[0] == pytest.approx(case.expected["loss"].item(), rel=1e-4)
    assert losses == pytest.approx(expected, rel=1e-4)
    official, width = reference.official_parameters(), fast.config.vision.width
    for key, parameter in fast.official_parameters().items():
        rows = torch.ones(len(parameter), dtype=torch.bool)
        if key.endswith("key.bias"):  # Its gradient is zero; AdamW makes steps of the rounding.
            continue
        if key.endswith("in_proj_bias"):
            rows[width : 2 * width] = False
        assert relative(parameter[rows], official[key][rows].double()) < 1e-4, key
