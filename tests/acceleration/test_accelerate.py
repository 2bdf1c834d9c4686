"""The reference model, accelerated and restored: its results, and what does not change."""

import copy
import io

import pytest
import torch
from torch import nn

import mplug2_fast as mf
from mplug2_fast.acceleration.swap import STATE
from mplug2_fast.ops.runtime import onednn
from tests.golden.cases import relative_error
from tests.tiny import SMALL, pair, random_text, random_video

TASKS = ("captioning", "question_answering")


def inputs(task, batch=3):
    if task == "captioning":
        return {}
    ids, mask = random_text(SMALL, batch, 6)
    return {"question_ids": ids, "question_mask": mask}


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


@pytest.fixture
def model(task):
    return pair(SMALL, task, scale=2.0)[0]


def fast_modules(model):
    return [module for module in model.modules() if hasattr(module, STATE)]


def test_generation(model, task):
    video, question = random_video(SMALL, 3), inputs(task)
    before = model.generate(video, **question, num_return=5)
    mf.accelerate(model)
    with mf.ops.strict():
        after = model.generate(video, **question, num_return=5)
    assert torch.equal(after.sequences, before.sequences)
    torch.testing.assert_close(after.scores, before.scores, atol=1e-4, rtol=0)


def test_hidden_states(model, task):
    video, question = random_video(SMALL, 3), inputs(task)
    ids, mask = random_text(SMALL, 3, 7)

    @torch.no_grad()
    def compute():
        embeds = model.encode_video(video)
        memory, memory_mask = (embeds, None) if not question else model.encode_question(video, *question.values())
        return model.encode_visual(video), embeds, memory, model.text_decoder(ids, mask, memory, memory_mask)

    before = compute()
    mf.accelerate(model)
    for actual, expected in zip(compute(), before, strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_connected_attention():
    config = SMALL.replace(fusion_layers=2, stride_layer=1)
    model = pair(config, "question_answering")[0]
    video, question = random_video(config, 3), inputs("question_answering")
    with torch.no_grad():
        before = model.encode_question(video, *question.values())[0]
        mf.accelerate(model)
        assert relative_error(model.encode_question(video, *question.values())[0], before) < 1e-5


def test_ranking():
    model = pair(SMALL, "question_answering")[0]
    video, question = random_video(SMALL, 3), inputs("question_answering")
    answers = random_text(SMALL, 9, 5, seed=1)
    before = model.rank_answers(video, *question.values(), *answers, k=4)
    mf.accelerate(model)
    after = model.rank_answers(video, *question.values(), *answers, k=4)
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1], before[1], atol=1e-5, rtol=0)


def test_a_restored_model_computes_the_same_bits(model, task):
    video, question = random_video(SMALL, 3), inputs(task)
    modules, shown = dict(model.named_modules()), repr(model)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    with torch.no_grad():
        before = model.encode_video(video)
        scores = model.generate(video, **question).scores
        mf.accelerate(model)
        assert not torch.equal(model.encode_video(video), before)
        assert list(model.state_dict()) == keys
        assert [(name, id(p)) for name, p in model.named_parameters()] == [(n, id(p)) for n, p in parameters.items()]
        model.generate(video, **question)
        mf.restore(model)
        assert torch.equal(model.encode_video(video), before)
        assert torch.equal(model.generate(video, **question).scores, scores)
    assert repr(model) == shown
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in modules.items()}
    assert not fast_modules(model)


def test_restore_keeps_trained_weights(model, task):
    mf.accelerate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    fresh = pair(SMALL, task, scale=2.0)[0]
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(1.01)
    mf.restore(model)
    video = random_video(SMALL, 2)
    assert torch.equal(model.encode_video(video), fresh.encode_video(video))


def test_only_the_instance_changes(task):
    first, second = (pair(SMALL, task, scale=2.0)[0] for _ in range(2))
    classes = {type(module) for module in second.modules()}
    forwards = {kind: kind.forward for kind in classes}
    video = random_video(SMALL, 2)
    expected, shown = second.encode_video(video), repr(second)
    mf.accelerate(first)
    assert repr(second) == shown
    assert not fast_modules(second)
    assert torch.equal(second.encode_video(video), expected)
    assert {kind: kind.forward for kind in classes} == forwards
    assert {type(module) for module in pair(SMALL, task)[0].modules()} == classes


def test_the_report_shows_the_swaps(model, task):
    shown = repr(model)
    report = mf.accelerate(model)
    assert repr(model) == shown
    lines = {line.split()[0]: line for line in str(report).splitlines()}
    block = "visual_encoder.visual.transformer.resblocks.{0..1}"
    assert lines[block].split(maxsplit=1)[1] == "ResidualAttentionBlock  → FastTemporalBlock"
    assert lines["text_decoder"].endswith("→ FastTextDecoder (keeps keys and values between calls)")
    assert lines["visual_encoder.visual.conv1"].endswith("left: nothing faster is known for it")
    names = dict(model.named_modules())
    assert {e.path for e in report.replaced} == {name for name, m in names.items() if hasattr(m, STATE)}
    assert all(type(names[e.path]).__name__ == e.module for e in report.entries)
    assert all(e.reason for e in report.left)
    # Every module is in the report, or inside one that is, or has nothing to compute with.
    paths = [entry.path for entry in report.entries]
    for name, module in names.items():
        if not list(module.children()) and list(module.parameters()):
            assert any(name == path or name.startswith(f"{path}.") for path in paths), name


def test_accelerating_twice_changes_nothing(model):
    first = mf.accelerate(model)
    shown = repr(model)
    second = mf.accelerate(model)
    assert repr(model) == shown
    assert [e.path for e in second.replaced] == [e.path for e in first.replaced]
    assert all(entry.reason == "already" for entry in second.replaced)
    mf.restore(model)
    assert not fast_modules(model)
    mf.restore(model)


def test_context(model):
    with mf.accelerated(model) as report:
        assert len(fast_modules(model)) == len(report.replaced) > 0
    assert not fast_modules(model)
    with pytest.raises(KeyError), mf.accelerated(model):
        raise KeyError
    assert not fast_modules(model)
    count = len(mf.accelerate(model).replaced)
    with mf.accelerated(model):
        pass
    assert len(fast_modules(model)) == count  # what was accelerated before stays so


def test_an_error_undoes_everything(model, monkeypatch):
    from mplug2_fast.acceleration.text_decoder import PredictionHeadKind

    def interrupted(module):
        raise KeyboardInterrupt

    monkeypatch.setattr(PredictionHeadKind, "recognise", interrupted)
    shown = repr(model)
    with pytest.raises(KeyboardInterrupt):
        mf.accelerate(model)
    assert repr(model) == shown


def test_trials_leave_no_traces(model):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    model.train().text_decoder.eval()
    modes = [module.training for module in model.modules()]
    seed = torch.random.get_rng_state()
    mf.accelerate(model)
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_modes_reach_all_modules(model):
    mf.accelerate(model)
    model.train()
    assert all(module.training for module in model.modules())
    mf.restore(model)
    assert all(module.training for module in model.modules())
    mf.accelerate(model)
    model.eval()
    mf.restore(model)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(model, dtype):
    video = random_video(SMALL, 2).to(dtype)
    exact = model.double().encode_video(video.double())
    mf.accelerate(model)
    model.to(dtype)
    out = model.encode_video(video)
    assert out.dtype is dtype
    assert relative_error(out, exact) < (1e-9 if dtype is torch.float64 else 0.05)


def test_recognised_in_any_dtype_and_on_the_meta_device(task):
    replaced = [e.path for e in mf.accelerate(pair(SMALL, task)[0]).replaced]
    for options in ({"dtype": torch.bfloat16}, {"device": "meta"}):
        name = {"captioning": "MPlug2ForCaptioning", "question_answering": "MPlug2ForQuestionAnswering"}[task]
        model = getattr(mf.reference, name)(SMALL, **options)
        assert [e.path for e in mf.accelerate(model).replaced] == replaced
        assert all(p.dtype is options.get("dtype", torch.float32) for p in model.parameters())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(model, task, way):
    video, question = random_video(SMALL, 2), inputs(task, 2)
    mf.accelerate(model)
    expected = model.generate(video, **question)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        assert stream.tell() < 1.2 * sum(4 * p.numel() for p in model.parameters()) + 500_000  # no caches in it
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    assert repr(other) == repr(model)
    assert len(fast_modules(other)) == len(fast_modules(model))
    assert torch.equal(other.generate(video, **question).sequences, expected.sequences)
    mf.restore(other)
    assert len(fast_modules(model)) > 0
    assert not fast_modules(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model.generate(video, **question).scores, expected.scores)


def test_state_dicts_load(model, task):
    other = pair(SMALL, task, seed=1)[0]
    mf.accelerate(model)
    model.load_state_dict(other.state_dict())
    video = random_video(SMALL, 2)
    expected = other.encode_video(video)
    assert relative_error(model.encode_video(video), expected) < 1e-5
    model.load_state_dict(pair(SMALL, task, seed=2)[0].state_dict(), assign=True)
    mf.restore(model)
    assert relative_error(model.encode_video(video), expected) > 0.1


def test_a_module_at_two_places():
    norm = nn.LayerNorm(8)
    model = nn.ModuleDict({"a": norm, "b": nn.ModuleDict({"c": norm})})
    report = mf.accelerate(model)
    assert model["a"] is model["b"]["c"] is norm
    assert str(report).splitlines() == [
        "a    LayerNorm  → FastLayerNorm",
        "b.c  LayerNorm  left: it is the same module as a",
    ]
    mf.restore(model)
    assert type(norm) is nn.LayerNorm


def test_packed_weights_follow_changes_and_restore_drops_them(monkeypatch, native_module):
    monkeypatch.setattr(onednn, "MUCH_WORK", 0)
    config = SMALL.replace(image_size=64, num_frames=9)  # 585 tokens
    model, video = pair(config)[0], random_video(config, 1)
    weight = model.visual_encoder.visual.transformer.resblocks[0].mlp.c_fc.weight
    with torch.no_grad():
        mf.accelerate(model)
        model.encode_video(video)
        assert onednn.is_packed(weight)
        for parameter in model.parameters():
            parameter.data.mul_(0.9)
        changed = model.encode_video(video)
        mf.restore(model)
        assert not onednn.is_packed(weight)
        assert relative_error(changed, model.encode_video(video)) < 1e-5
