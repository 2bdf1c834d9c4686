"""The formulas against known figures of the Large model: 16 frames of 224 pixels, 5 beams, 15 steps; in GFLOP."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mplug2_fast as mf
from bench import flops
from mplug2_fast import MPlug2Config, MPlugConfig, reference
from mplug2_fast.models.mplug2 import MPlug2ForCaptioning

LARGE = MPlug2Config.preset("large")
RUN = {"frames": 16, "beams": 5, "steps": 15}


@pytest.mark.parametrize(
    ("part", "expected", "digits"),
    [
        (flops.patches(LARGE, 16), 5, 0),
        (flops.vision_projections(LARGE, 16), 828, 0),
        (flops.vision_scores(LARGE, 16), 104, 0),
        (flops.vision_mlp(LARGE, 16), 1656, 0),
        (flops.local_temporal(LARGE, 16), 413, 0),
        (flops.visual_projection(LARGE, 16), 0, 0),
        (flops.universal_first(LARGE, 16), 19, 0),
        (flops.universal_last(LARGE, 16), 190, 0),
        (flops.memory_keys_values(LARGE, 4097), 206, 0),
        (flops.decoder_tokens(LARGE, 5, 15), 25, 0),
        (flops.cross_attention(LARGE, 4097, 5, 15), 14, 0),
        (flops.head(LARGE, 5, 15), 4.6, 1),
        (flops.needed("captioning", LARGE, **RUN), 3460, -1),
    ],
)
def test_large(part, expected, digits):
    assert round(part / 1e9, digits) == expected


def test_tasks_are_the_sums_of_their_parts():
    need = {task: flops.needed(task, LARGE, **RUN) for task in flops.TASKS}
    assert need["features"] == need["vision"] + need["universal"]
    assert need["captioning"] == need["features"] + need["decode"]


@pytest.mark.parametrize("task", flops.TASKS)
def test_work_is_proportional_to_the_batch(task):
    assert flops.needed(task, LARGE, **RUN, batch=3) == 3 * flops.needed(task, LARGE, **RUN)


def counted(run):
    """FLOP that PyTorch counts. In these parts the reference does no more than necessary."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_question_answering_against_the_reference():
    """Text encoder and fusion layers, one of them connected, over whole sequences."""
    config = MPlug2Config.preset("tiny").replace(stored_layers=4, fusion_layers=4, stride_layer=2)
    model = reference.MPlug2ForQuestionAnswering(config, device="meta").eval()
    ids, visual = torch.zeros(1, 7, dtype=torch.long, device="meta"), torch.empty(1, 65, 128, device="meta")
    mask, seen = torch.ones_like(ids), torch.ones(1, 65, dtype=torch.long, device="meta")
    assert flops.text_encoder(config, 7) == counted(lambda: model.text_encoder(ids, mask))
    text = torch.empty(1, 7, 128, device="meta")
    assert flops.visual_tokens(config, 4) == 65
    assert flops.fusion(config, 4, 7) == counted(lambda: model.fusion_encoder(text, mask, visual, seen))
    parts = flops.needed("features", config, **RUN) + flops.decoding(config, 257 + 7, 5, 15)
    asked = flops.text_encoder(config, 7) + flops.fusion(config, 16, 7)
    assert flops.needed("answering", config, **RUN, question=7) == parts + asked
    model = reference.MPlug2ForRetrieval(config, device="meta").eval()
    features = counted(lambda: (model.image_feature(visual), model.text_feature(text)))
    expected = flops.needed("features", config, **RUN) + flops.text_encoder(config, 7) + features
    assert flops.needed("retrieval features", config, **RUN, texts=[7]) == expected


MPLUG = MPlugConfig.preset("large")


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (flops.vision(MPLUG, 1) - flops.visual_projection(MPLUG, 1), 382),
        (flops.memory_keys_values(MPLUG, 577 + 10), 17),
        (flops.needed("answering", MPLUG, frames=1, beams=5, steps=10), 422),
        (128 * flops.fusion(MPLUG, 1, 30), 1469),
        (flops.matching(MPLUG, 1, [30] * 128), 372),
    ],
)
def test_mplug_large(part, expected):
    assert round(part / 1e9) == expected


def small_mplug(**changes):
    return MPlugConfig.preset("tiny").replace(vocab_size=700, stored_layers=5, fusion_layers=5, **changes)


@pytest.mark.parametrize("stride", [3, 6])
@torch.no_grad()
def test_mplug_against_the_reference(stride):
    config = small_mplug(stride_layer=stride)
    tasks = [name for name, task in mf.tasks.TASKS.items() if config.has_modules_for(task)]
    model = reference.MPlug(config, tasks, device="meta").eval()
    image, ids = torch.empty(1, 3, 48, 48, device="meta"), torch.zeros(1, 7, dtype=torch.long, device="meta")
    mask, visual = torch.ones_like(ids), torch.empty(1, 37, 128, device="meta")
    assert flops.visual_tokens(config, 1) == 37
    assert flops.vision(config, 1) == counted(lambda: model.encode_image(image))
    assert flops.text_encoder(config, 7) == counted(lambda: model.text_encoder(ids, mask))
    asked = flops.text_encoder(config, 7) + flops.fusion(config, 1, 7)
    assert asked == counted(lambda: model.memory(visual, ids, mask))
    features = flops.retrieval_features(config, 1, [7])
    text = torch.empty(1, 7, 128, device="meta")
    assert features == flops.vision(config, 1) + flops.text_encoder(config, 7) + counted(
        lambda: (model.image_feature(visual), model.text_feature(text))
    )
    # Of the last layer matching needs only the first token: no other queries, outputs, attention and FFN.
    pairs, dim = counted(lambda: model.match(visual, text, mask)), config.text.hidden_size
    rest = 2 * 6 * dim * (4 * dim + 2 * config.text.intermediate_size) + 4 * 6 * dim * (7 + 37)
    assert flops.matching(config, 1, [7]) == pairs - rest


@pytest.mark.parametrize("stride", [3, 6])
@torch.no_grad()
def test_what_the_fast_model_computes_is_what_is_needed(stride):
    config, lengths = small_mplug(stride_layer=stride), [5, 2, 7, 5]
    model = mf.MPlug(config, ["retrieval", "answer_ranking"]).eval()
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    text, visual = torch.randn(4, 7, 128), torch.randn(37, 128)
    found = counted(lambda: model.matching(model.fusion.first_tokens(text, mask, visual)))
    # After a connected layer no token is left out.
    assert 1 <= found / flops.matching(config, 1, lengths) < (1.1 if stride == 3 else 1.0001)


def test_training_against_the_reference():
    """The reference does more: it decodes the last token, attends without a causal shortcut, scores the prompt and
    computes the latents' own part for each video."""
    config = MPlug2Config.preset("tiny")
    model = reference.MPlug2ForCaptioning(config)
    ids = torch.full((2, 9), 105)

    def step():
        model(torch.randn(2, 3, 4, 32, 32), ids, torch.ones_like(ids)).backward()

    need = flops.training(config, 4, 8, 2)
    assert need < counted(step) < 1.1 * need


def test_training_of_question_answering_against_the_reference():
    config = MPlug2Config.preset("tiny")
    model = reference.MPlug2ForQuestionAnswering(config)
    question, answer = torch.full((2, 7), 105), torch.full((2, 6), 106)
    masks, ones = (torch.ones_like(question), torch.ones_like(answer)), torch.ones(2, dtype=torch.long)

    def step():
        video = torch.randn(2, 3, 4, 32, 32)
        model(video, question, masks[0], answer, masks[1], ones, ones.float()).backward()

    need = flops.training(config, 4, 5, 2, question=7)
    assert need < counted(step) < 1.15 * need


def test_a_checkpointed_step_computes_most_of_the_forward_pass_again():
    need, again = (
        function("captioning step checkpointed", LARGE, **RUN) for function in (flops.needed, flops.recomputed)
    )
    assert 0.8 < 3 * again / need < 1


def test_bytes_of_decoding():
    """0.42 GB of weights and 0.20 GB of the memory's keys and values per step, in 2-byte elements."""
    each = {**RUN, "steps": 1}
    two = {**RUN, "steps": 2}
    step = flops.needed_bytes("decode", LARGE, 2, **two) - flops.needed_bytes("decode", LARGE, 2, **each)
    assert step / 1e9 == pytest.approx(0.42 + 0.20, abs=0.01)
    assert flops.needed_bytes("decode", LARGE, 4, **RUN) / flops.needed_bytes("decode", LARGE, 2, **RUN) == (
        pytest.approx(2, abs=1e-4)
    )


def test_bytes_of_the_other_tasks():
    need = {task: flops.needed_bytes(task, LARGE, 2, **RUN) for task in (*flops.TASKS, "captioning step")}
    video, states = 2 * 3 * 16 * 224**2, 2 * 4097 * 1024
    assert need["features"] == need["vision"] + need["universal"] - 2 * states
    assert need["captioning"] == need["features"] + need["decode"] - 2 * states
    assert need["features"] - video - states == pytest.approx(0.71e9 + 4 * 16.8e6, rel=0.05)
    model = MPlug2ForCaptioning(LARGE, device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert need["captioning step"] == pytest.approx(24 * parameters, rel=0.01)
    assert need["answering"] > need["captioning"] + 2 * 12 * 1024**2 * LARGE.text.text_encoder_layers
    assert flops.needed_bytes("features", LARGE, 2, **RUN, batch=2) - need["features"] == video + states


def test_unequal_widths_are_projected():
    config = LARGE.replace(width=768)
    assert flops.visual_projection(config, 16) == 2 * 4097 * 768 * 1024


def test_temporal_downsampling_halves_the_frames():
    config = LARGE.replace(temporal_downsampling=True, temporal_stride=2)
    assert flops.visual_tokens(config, 16) == 1 + 8 * 256
    assert 2 * flops.vision_mlp(config, 16) == flops.vision_mlp(LARGE, 16)
    assert 2 * flops.patches(config, 16) == 3 * flops.patches(LARGE, 16)
