"""What a recipe can ask for, one by one."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast.datasets import Item, write_items
from mplug2_fast.errors import ConfigError, DataError
from mplug2_fast.training import Trainer
from mplug2_fast.training.scst import CiderReward, weighted_loss
from tests.tiny import pair, random_text, random_video
from tests.training.conftest import SMALL, VOCABULARY

BOTH = [{"data": "tests.training.data:Noise", "task": ["captioning", "question_answering"], "weight": [1.0, 0.5]}]
TWO = [
    {"data": "tests.training.data:Noise", "task": "captioning", "batch_size": 2},
    {"data": "tests.training.data:Noise", "task": "question_answering", "batch_size": 2, "share": 0.5},
]


def changed(trainer, before):
    return {name for name, p in trainer.model.official_parameters().items() if not torch.equal(p, before[name])}


def start(recipe):
    trainer = Trainer(recipe, note=lambda line: None)
    return trainer, {name: p.clone() for name, p in trainer.model.official_parameters().items()}


@pytest.mark.parametrize(
    ("sources", "per_step"), [(BOTH, "one"), (TWO, "one"), (TWO, "all")], ids=["shared video", "alternate", "joint"]
)
def test_several_tasks(recipe, sources, per_step):
    trainer, _ = start(recipe(sources=sources, sources_per_step=per_step, steps=4))
    folder = trainer.train()
    lines = [json.loads(line) for line in (trainer.folder / "log.jsonl").read_text().splitlines()]
    tasks = [{name.removeprefix("loss/") for name in line if name.startswith("loss/")} for line in lines]
    both = {"captioning", "question_answering"}
    assert set.union(*tasks) == both
    assert all(found == both for found in tasks) == (sources is BOTH or per_step == "all")
    loaded = mf.from_pretrained(folder, pack=False)
    assert list(loaded.tasks) == ["captioning", "question_answering"]
    for name, p in trainer.model.official_parameters().items():
        assert torch.equal(loaded.official_parameters()[name], p), name
    card = (folder / "README.md").read_text()
    assert "tests.training.data:Noise" in card
    assert '"steps": 4' in card


def test_new_words_for_a_checkpoint(recipe, tmp_path):
    words = VOCABULARY.read_text(encoding="utf-8").split()
    words[words.index("[unused0]")] = "sea"
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    model = {"checkpoint": str(VOCABULARY.parent), "vocabulary": str(vocabulary)}
    trainer, _ = start(recipe(model=model, steps=1))
    assert "sea" in (trainer.train() / "vocab.txt").read_text(encoding="utf-8").split()
    vocabulary.write_text("".join(f"{word}\n" for word in words[:-1]), encoding="utf-8")
    with pytest.raises(ConfigError, match="vocabulary of that size"):
        start(recipe(model=model))


def test_only_temporal_modules(recipe):
    model = {**recipe().model.model_dump(), "train_only": ["*lmhra*"]}
    trainer, before = start(recipe(model=model, steps=2))
    trainer.train()
    names = changed(trainer, before)
    assert names
    assert all("lmhra" in name for name in names)
    with pytest.raises(ConfigError, match="the pattern 'no\\*' matches no official parameter name"):
        start(recipe(model={**model, "freeze": ["no*"]}))[0].prepare()


def test_lora(recipe):
    pytest.importorskip("peft")
    targets = ["*resblocks*c_fc.weight", "text_decoder*dense.weight", "text_encoder*.self.query.weight"]
    targets += ["text_encoder*.self.value.weight", "*resblocks.0.attn.in_proj_weight"]
    trainer, before = start(recipe(lora={"rank": 2, "targets": targets}, steps=3))
    folder = trainer.train()
    written = mf.from_pretrained(folder, pack=False).official_parameters()
    for name, p in written.items():
        rank = int(torch.linalg.matrix_rank(p - before[name], rtol=1e-4)) if p.ndim == 2 else 0
        assert rank == (2 if any(fnmatchcase(name, target) for target in targets) else 0), name
        assert rank or torch.equal(p, before[name])
    video = random_video(trainer.model.config)
    trainer.model.eval()
    ours = mf.from_pretrained(folder, pack=False)
    with torch.no_grad():
        torch.testing.assert_close(trainer.model.encode_video(video), ours.encode_video(video), atol=1e-4, rtol=1e-4)


def test_average_of_the_weights(recipe):
    trainer, before = start(recipe(ema=0.5, steps=2, optimizer={"learning_rate": 1e-2}))
    folder = trainer.train()
    written = mf.from_pretrained(folder, pack=False).official_parameters()
    name = "text_decoder.bert.encoder.layer.0.attention.self.query.weight"
    last = trainer.model.official_parameters()[name]
    assert (written[name] - before[name]).norm() < (last - before[name]).norm()


def test_distillation_reaches_the_decoder(recipe):
    """With the teacher equal to the student and all of the weight on it, the gradient of the soft loss is zero."""
    trainer, _ = start(recipe(distillation={"alpha": 1.0, "momentum": 0.5}, steps=1))
    trainer.train()
    gradients = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
    assert max(gradients) < 1e-5
    plain, _ = start(recipe(out=str(trainer.folder / "plain"), steps=1))
    plain.train()
    assert max(p.grad.norm() for p in plain.model.parameters()) > 1e-2


def test_bfloat16_autocast(recipe):
    trainer, before = start(recipe(autocast="bfloat16", steps=2))
    trainer.train()
    assert changed(trainer, before)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_batches_that_cannot_be_divided(recipe):
    with pytest.raises(ConfigError, match=r"batch_size 4 of .* must be a multiple of the number of ranks"):
        start(recipe(accumulate=3))


def test_items_without_the_fields_of_the_task(recipe, tmp_path):
    write_items(tmp_path / "a.jsonl", [Item("7", video="a.mp4")])
    with pytest.raises(DataError, match="the item 7 has no caption, which captioning needs"):
        start(recipe(sources=[{"data": str(tmp_path / "a.jsonl"), "task": "captioning"}]))


def test_self_critical_loss():
    """Against the definition, on hypotheses and rewards that are given."""
    reference, fast = pair(mf.MPlug2Config.preset("tiny").replace(**SMALL))
    config = fast.config
    ids, mask = random_text(config, 4, 5)
    sequences = ids.masked_fill(mask == 0, -1).view(2, 2, 5)
    rewards = torch.tensor([[1.0, 0.0], [0.2, 0.6]])
    video = random_video(config)
    memory = fast.decoder.remember(fast.encode_video(video))
    loss = weighted_loss(fast, memory, sequences, rewards)
    embeds = reference.encode_video(video).repeat_interleave(2, dim=0)
    log_p = reference.text_decoder(ids, mask, embeds, None).log_softmax(-1)
    expected = 0.0
    for row in range(4):
        length = int(mask[row].sum())
        total = sum(log_p[row, t, ids[row, t + 1]] for t in range(length - 1))
        advantage = rewards.flatten()[row] - rewards[row // 2].mean()
        expected -= total / ((5 + length - 1) / 6) ** 0.6 / length * advantage / 4
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_reward_is_cider_with_the_frequencies_of_all_references():
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider

    references = [["a red square", "the red square"], ["a blue circle"], ["green things move left"]]
    words = ["a red square", "a blue square", "green things", "a red circle"]
    reward = CiderReward(references, list, lambda ids: words[ids[0]])
    items = [Item(str(i), caption=tuple(texts)) for i, texts in enumerate(references)]
    found = reward(torch.tensor([[[0], [1]], [[1], [3]], [[2], [0]]]), items)
    for column in range(2):
        tests = {i: [words[[(0, 1), (1, 3), (2, 0)][i][column]]] for i in range(3)}
        _, expected = Cider().compute_score(dict(enumerate(references)), tests)
        torch.testing.assert_close(found[:, column], torch.tensor(expected, dtype=torch.float32))
    assert reward(torch.tensor([[[0], [1]]]), items[:1])[0].tolist() == found[0].tolist()


def test_a_run_with_cider_as_the_reward(recipe):
    pytest.importorskip("pycocoevalcap")
    source = {"data": "tests.training.data:Noise", "task": "captioning", "batch_size": 2, "objective": "scst"}
    trainer, before = start(recipe(sources=[source], steps=2, save_every=9))
    trainer.train()
    assert changed(trainer, before)
