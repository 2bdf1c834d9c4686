"""mPLUG: the fast model computes what the reference computes, whatever the sizes."""

import pytest
import torch
from torch import nn

import mplug2_fast as mf
from mplug2_fast.nn.momentum import MomentumCopy
from mplug2_fast.nn.packing import Group, Packing
from mplug2_fast.tasks.matching import candidates
from mplug2_fast.tasks.retrieval import MomentumContrast
from tests.tiny import randomise

SMALL = mf.MPlugConfig.preset("tiny").replace(
    vision={"width": 64, "layers": 2, "image_size": 24},
    text={"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 700},
    contrast={"embed_dim": 16},
)
TASKS = ["captioning", "question_answering", "answer_ranking", "grounding", "retrieval"]


def pair(config=SMALL, tasks=TASKS):
    return tuple(randomise(library.MPlug(config, tasks)) for library in (mf.reference, mf))


def inputs(rows=3, texts=5, frames=1, size=24, tokens=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(rows, 3, frames, size, size, generator=generator)
    ids = torch.randint(5, 700, (texts, tokens), generator=generator)
    ids[:, 0] = 101
    mask = (torch.arange(tokens) < torch.arange(tokens, tokens - texts, -1)[:, None].clamp(min=2)).long()
    return video, ids * mask, mask


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("stride", [1, 2, 3, 6])
@pytest.mark.parametrize("frames", [1, 3])
def test_fusion(stride, frames):
    """With several texts of an image, keys and values are shared; the result is that of each pair alone."""
    config = SMALL.replace(stride_layer=stride, width=128)
    reference, fast = pair(config)
    video, ids, mask = inputs(frames=frames)
    with torch.no_grad():
        visual, text = fast.encode_video(video), fast.encode_text(ids, mask)
        close(visual, reference.encode_video(video))
        close(text, reference.text_encoder(ids, mask))
        rows = [text[None, :2].expand(3, -1, -1, -1), mask[None, :2].expand(3, -1, -1)]
        fused = fast.fuse(*rows, visual)
        for row in range(3):
            close(fast.fusion.first_tokens(text[:2], mask[:2], visual[row]), fused.text[row, :, 0])
            for column in range(2):
                alone = reference.fuse(text[column : column + 1], mask[column : column + 1], visual[row : row + 1])
                close(fused.visual[row, column], alone[0][0])
                seen = mask[column].bool()
                close(fused.text[row, column][seen], alone[1][0][seen])


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_retrieval_scores(frames, k):
    reference, fast = pair()
    video, ids, mask = inputs(frames=frames)
    found = fast.predict("retrieval", video, text_ids=ids, text_mask=mask, k=k)
    visual = reference.encode_video(video)
    near = found.similarities.sort(dim=1).values.diff(dim=1).min()
    assert near > 1e-5  # no ties that rounding decides
    all_of = reference.retrieval_scores(visual, ids, mask, 3, add_similarity=frames > 1)
    for way, expected in enumerate(all_of):
        actual = found[way]
        both = (actual > -100) & (expected > -100)
        assert both.any()
        close(actual[both], expected[both])
    assert int((found.by_visual > -100).sum(dim=1).max()) == min(k, 5)
    assert int((found.by_text > -100).sum(dim=1).max()) == min(k, 3)


@torch.no_grad()
def test_packed_texts():
    """Padding inside a text is not seen, and the results are in the order of the texts."""
    _, fast = pair()
    _, ids, mask = inputs()
    mask[1, 2] = 0
    packing = Packing.of(mask)
    assert [(group.texts, group.tokens) for group in packing.groups] == [(1, n) for n in (3, 4, 5, 6, 7)]
    assert [group.mask is None for group in packing.groups] == [True, True, True, False, True]
    assert Packing.of(mask, skip_last=6).groups == (Group(slice(0, 5), 5, 1, None),)
    layer, x = fast.text.layers[0], fast.text.embeddings(ids)
    expected = layer(x, key_padding_mask=mask)
    close(layer(packing.pack(x)[None], packing=packing)[0], packing.pack(expected))
    first = layer(packing.pack(x)[None], packing=packing._replace(first_only=True))[0]
    close(packing.restore(first), expected[:, 0])


@pytest.mark.parametrize("part", ["", "layers.0", "layers.3.attention.self"])
def test_watched_parts_are_called_in_matching(part):
    _, fast = pair()
    video, ids, mask = inputs()
    expected = fast.predict("retrieval", video, text_ids=ids, text_mask=mask, k=3)
    calls = []
    fast.fusion.get_submodule(part).register_forward_hook(lambda *_: calls.append(part))
    found = fast.predict("retrieval", video, text_ids=ids, text_mask=mask, k=3)
    assert len(calls) == 3  # once for each image
    close(found.by_visual, expected.by_visual)


def test_candidates_of_both_sides():
    similarities = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.7]])
    found = candidates(similarities, 1)
    assert found.by_visual.tolist() == [[True, False, False], [True, False, False]]
    assert found.by_text.tolist() == [[True, False], [False, True], [False, True]]
    assert found.any.tolist() == [[True, False, False], [True, True, True]]
    with pytest.raises(ValueError, match="k must be at least 1, got -1"):
        candidates(similarities, -1)


def test_boxes():
    reference, fast = pair()
    video, ids, mask = inputs(texts=3)
    found = fast.predict("grounding", video, text_ids=ids, text_mask=mask)
    boxes, tokens, logits = reference.ground(reference.encode_video(video), ids, mask)
    assert torch.equal(found.ids, tokens)
    close(found.boxes, boxes)
    close(found.logits, logits)


@pytest.mark.parametrize("weighting", ["official", "per_sample", "none"])
def test_grounding_loss_of_one_sample_has_no_broadcast(weighting):
    _, fast = pair()
    video, ids, mask = inputs(rows=2, texts=2)
    batch = {"video": video, "text_ids": ids, "text_mask": mask, "target_boxes": torch.rand(2, 4)}

    def loss(rows, kind):
        return fast.loss("grounding", {name: each[rows] for name, each in batch.items()}, weighting=kind)

    alone = [loss(slice(i, i + 1), weighting) for i in range(2)]
    together = loss(slice(0, 2), weighting)
    if weighting == "official":
        close(alone[0], loss(slice(0, 1), "per_sample"))
        assert not torch.isclose(together, (alone[0] + alone[1]) / 2, rtol=1e-3)
    else:
        close(together, (alone[0] + alone[1]) / 2)
    with pytest.raises(ValueError, match="weighting must be"):
        loss(slice(0, 2), "mean")


def test_contrast_within_the_batch():
    """Without queues, equal ids are right for one another, and a batch of one id has no wrong pairs."""
    _, fast = pair()
    video, ids, mask = inputs(rows=4, texts=4)
    batch = {"video": video, "text_ids": ids, "text_mask": mask, "ids": torch.tensor([1, 2, 2, 3])}
    torch.manual_seed(0)
    found = fast.tasks["retrieval"].losses(fast, batch)
    assert found.image_weights[1, 2] == found.text_weights[2, 1] == 0
    assert (found.image_weights.diagonal() == 0).all()
    even = fast.tasks["retrieval"].losses(fast, batch, sharpness=0.0)
    assert even.image_weights.eq((batch["ids"][:, None] != batch["ids"]) / 4).all()
    same = fast.tasks["retrieval"].losses(fast, {**batch, "ids": torch.ones(4, dtype=torch.int64)})
    assert torch.isfinite(same.total)
    assert same.image_weights.eq(0).all()
    same.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fast.parameters())


def test_queues_hold_the_latest_features():
    _, fast = pair()
    video, ids, mask = inputs(rows=2, texts=2)
    batch = {"video": video, "text_ids": ids, "text_mask": mask}
    state = MomentumContrast(fast, queue_size=4, momentum=0.5)
    for number in range(3):
        fast.tasks["retrieval"].losses(
            fast, {**batch, "ids": torch.tensor([2 * number, 2 * number + 1])}, state=state, alpha=0.4
        )
    assert state.idx_queue.tolist() == [[4, 5, 2, 3]]
    assert int(state.queue_ptr) == 2
    torch.testing.assert_close(state.image_queue.norm(dim=0), torch.ones(4))
    with pytest.raises(ValueError, match="not a multiple of the batch"):
        MomentumContrast(fast, queue_size=3).enqueue(torch.ones(2, 16), torch.ones(2, 16), torch.zeros(2).long())


def test_momentum_copy_leaves_parts_out():
    _, fast = pair()
    copy = MomentumCopy(fast, without=("fusion", "decoder"), momentum=0.75)
    assert copy.model.fusion is None
    assert fast.fusion is not None
    name = "visual_encoder_m.visual.ln_pre.weight"
    before = copy.official_parameters()[name].clone()
    with torch.no_grad():
        fast.visual.norm_pre.weight.add_(1.0)
    copy.update(fast)
    torch.testing.assert_close(copy.official_parameters()[name], before + 0.25)
    assert not any(key.startswith(("fusion", "text_decoder", "temp")) for key in copy.official_parameters())


def test_a_prompt_starts_every_text():
    _, fast = pair()
    video, _, _ = inputs()
    plain = fast.predict("captioning", video, max_length=5, min_length=5, num_beams=2)
    start = plain.sequences[0, 0, :3].tolist()
    found = fast.predict("captioning", video[:1], prefix=start, max_length=3, min_length=3, num_beams=1)
    assert found.sequences[0, 0, :3].tolist() == start
    assert found.sequences.shape[-1] == 6
    greedy = fast.predict("captioning", video[:1], prefix=found.sequences[0, 0, :5].tolist(), max_length=1, num_beams=1)
    assert greedy.sequences[0, 0, :5].tolist() == found.sequences[0, 0, :5].tolist()


def test_a_task_of_another_family_is_refused():
    class Shared(mf.tasks.Captioning):
        name = "shared"
        modules = frozenset({"vision", "universal"})

    with pytest.raises(mf.ConfigError, match="shared needs universal, and mPLUG has only vision, text"):
        mf.MPlug(SMALL, [Shared()])
    with pytest.raises(mf.ConfigError, match="MPlug cannot be built from a MPlug2Config: use its own"):
        mf.MPlug(mf.MPlug2Config.preset("tiny"), ["captioning"])


def test_retrieval_works_for_mplug2_too():
    model = mf.MPlug2(mf.MPlug2Config.preset("tiny").replace(vocab_size=700), ["retrieval", "grounding"])
    names = model.official_names.needed
    assert {"vision_proj.weight", "text_proj.bias", "temp", "itm_head.weight"} <= names.keys()
    video = torch.randn(2, 3, 4, 32, 32)
    _, ids, mask = inputs(rows=2, texts=2)
    found = model.predict("retrieval", video, text_ids=ids, text_mask=mask, k=2)
    assert found.by_visual.shape == (2, 2)
    assert model.predict("grounding", video, text_ids=ids, text_mask=mask).boxes.shape == (2, 4)
    assert model.contrast.temperature.item() == pytest.approx(0.07)


def test_attention_dropout_of_the_tower_in_training():
    model = mf.MPlug(SMALL.replace(attention_dropout=0.5), ["captioning"]).train()
    dropouts = [m for m in model.visual.modules() if isinstance(m, nn.Dropout)]
    assert {m.p for m in dropouts} == {0.5}
