"""A model has the modules that its tasks need, and its parts can be used on their own."""

import pytest
import torch
from torch import nn

import mplug2_fast as mf
from mplug2_fast.tasks import TASKS, Task, load
from tests.tiny import SMALL, random_text, random_video, randomise

CAPTIONING, ANSWERING, RANKING = list(TASKS)[:3]


class Matching(Task):
    """Does the text fit the video? A head on the fused text."""

    name = "matching"
    modules = frozenset({"vision", "universal", "text", "fusion"})

    def head(self, config):
        return nn.Linear(config.text.hidden_size, 2)

    def loss(self, model, batch):
        return self.predict(model, **batch).square().mean()

    def predict(self, model, video, text_ids, text_mask):
        fused = model.fuse(model.encode_text(text_ids, text_mask), text_mask, model.encode_video(video))
        return model.heads[self.name](fused.text[:, 0])

    def respond(self, model, tokenizer):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("tasks", "absent"),
    [([CAPTIONING], {"text", "fusion"}), ([CAPTIONING, RANKING], set()), ([Matching()], {"decoder"})],
)
def test_exactly_the_modules_of_the_tasks_are_built(tasks, absent):
    model = mf.MPlug2(SMALL, tasks)
    assert model.module_names == {"vision", "universal", "text", "fusion", "decoder"} - absent
    for name in ("text", "fusion", "decoder"):
        assert hasattr(model, name) == (name not in absent)
    held = {view.data_ptr() for view in model.official_parameters().values()}
    assert all(parameter.data_ptr() in held for parameter in model.parameters())


def test_a_model_of_two_tasks_is_both_models():
    both = randomise(mf.MPlug2(SMALL, [CAPTIONING, ANSWERING]))
    alone = randomise(mf.MPlug2ForCaptioning(SMALL))
    video, (ids, mask) = random_video(SMALL), random_text(SMALL, 2, 6)
    batch = {"video": video, "caption_ids": ids, "caption_mask": mask}
    assert both.loss(CAPTIONING, batch).item() == alone(video, ids, mask).item()
    assert both.loss({CAPTIONING: batch})[CAPTIONING].item() == alone(video, ids, mask).item()
    assert torch.equal(both.predict(CAPTIONING, video).sequences, alone.generate(video).sequences)
    assert both.modules_of(CAPTIONING) == {"vision", "universal", "decoder"}


def test_parts():
    model = randomise(mf.MPlug2ForQuestionAnswering(SMALL))
    video, (ids, mask) = random_video(SMALL), random_text(SMALL, 2, 6)
    fused = model.fuse(model.encode_text(ids, mask), mask, model.encode_video(video))
    assert fused.memory.shape[:2] == fused.memory_mask.shape == (2, fused.visual.shape[1] + 6)
    found = mf.MPlug2.generate(model, fused.memory, fused.memory_mask, min_length=1, max_length=10)
    expected = model.generate(video, question_ids=ids, question_mask=mask)
    torch.testing.assert_close(found.scores, expected.scores)
    one_frame = model.encode_video(video[:, :, :1])
    torch.testing.assert_close(model.encode_image(video[:, :, 0]), one_frame)


def test_a_new_head_leaves_the_other_weights():
    model = randomise(mf.MPlug2ForQuestionAnswering(SMALL))
    before = mf.official_state_dict(model)
    model.add_task(Matching())
    after = mf.official_state_dict(model)
    assert after.keys() - before.keys() == {"heads.matching.weight", "heads.matching.bias"}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    text = dict(zip(("text_ids", "text_mask"), random_text(SMALL, 2, 6), strict=True))
    model.loss("matching", {"video": random_video(SMALL), **text}).backward()
    assert model.heads["matching"].weight.grad.abs().sum() > 0
    assert not model.predict("matching", random_video(SMALL), **text).requires_grad


def test_bad_tasks_are_named():
    model = mf.MPlug2ForCaptioning(SMALL)
    with pytest.raises(ValueError, match="matching needs fusion, text, and this model has only decoder"):
        model.add_task(Matching())
    with pytest.raises(mf.ConfigError, match="no task 'poetry': choose one of captioning"):
        mf.MPlug2(SMALL, ["poetry"])
    with pytest.raises(ValueError, match="was not built for question_answering, only for captioning"):
        model.predict(ANSWERING, random_video(SMALL))
    with pytest.raises(ValueError, match="one or more different tasks"):
        mf.MPlug2(SMALL, [CAPTIONING, CAPTIONING])
    with pytest.raises(mf.ConfigError, match=r"cannot be imported"):
        load("no_such_module:Name")
    with pytest.raises(mf.ConfigError, match=r"is a module, not a"):
        load("mplug2_fast.tasks:base")
