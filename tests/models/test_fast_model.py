"""The fast model against the reference in cases that no golden case covers, and its further guarantees."""

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast.nn.vision_transformer import padded
from tests.golden.cases import relative_error
from tests.tiny import SMALL, pair, random_text, random_video, randomise

CONFIGURATIONS = {
    "small": SMALL,
    "vision wider than text": SMALL.replace(width=128),
    "temporal downsampling": SMALL.replace(temporal_downsampling=True, temporal_stride=2),
    "kernel 5, reduction 4": SMALL.replace(temporal_kernel_size=5, temporal_reduction=4),
    "one frame": SMALL.replace(num_frames=1),
    "connected fusion": SMALL.replace(stored_layers=5, fusion_layers=4, stride_layer=2),
    "four fusion layers of six": SMALL.replace(stored_layers=6, fusion_layers=4, stride_layer=3),
}


@pytest.fixture(params=CONFIGURATIONS)
def config(request):
    return CONFIGURATIONS[request.param]


@pytest.mark.parametrize("task", ["captioning", "question_answering"])
def test_same_released_keys_and_shapes(config, task):
    reference, fast = pair(config, task)
    shapes = [{key: tuple(v.shape) for key, v in m.official_parameters().items()} for m in (reference, fast)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in fast.parameters()) == sum(v.numel() for v in fast.official_parameters().values())


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_encode_video(config, frames):
    reference, fast = pair(config)
    video = random_video(config, frames=frames)
    with torch.no_grad():
        assert relative_error(fast.encode_video(video), reference.encode_video(video)) < 1e-5


def test_encode_video_with_gradients_equals_without(config):
    _, fast = pair(config)
    video = random_video(config)
    with torch.no_grad():
        inference = fast.encode_video(video)
    assert relative_error(fast.encode_video(video).detach(), inference) < 1e-5


def test_strided_and_low_precision_video():
    _, fast = pair(SMALL)
    video = random_video(SMALL)
    strided = torch.randn(2, 3, 8, 40, 40)[:, :, ::2, 4:36, 4:36].copy_(video)
    with torch.no_grad():
        torch.testing.assert_close(fast.encode_video(strided), fast.encode_video(video))
        torch.testing.assert_close(fast.encode_video(video.bfloat16()), fast.encode_video(video.bfloat16().float()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 1},
        {"num_beams": 3, "num_return": 3},
        {"num_beams": 2, "num_return": 7, "max_length": 6},
        {"min_length": 5, "max_length": 5},
        {"min_length": 0, "max_length": 1, "num_return": 5},
        {"num_beams": 10, "num_return": 10, "max_length": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("end_bias", [0.0, 4.0, 8.0])
def test_captioning_beam_search(options, end_bias):
    reference, fast = pair(SMALL, seed=3, scale=2.0)
    for model in (reference, fast):
        model.official_parameters()["text_decoder.cls.predictions.bias"][102] = end_bias
    video = random_video(SMALL, batch=3)
    ours, theirs = (model.generate(video, **options) for model in (fast, reference))
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-5)
    assert ours.sequences.tolist() == theirs.sequences.tolist()


def test_question_answering(config):
    reference, fast = pair(config, "question_answering", seed=1, scale=2.0)
    video, question = random_video(config, batch=3), random_text(config, 3, 6)
    ours, theirs = (m.generate(video, question_ids=question[0], question_mask=question[1]) for m in (fast, reference))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-5)

    answers = random_text(config, 9, 5, seed=2)
    for k in (1, 4, 9):
        ours, theirs = (m.rank_answers(video, *question, *answers, k) for m in (fast, reference))
        assert ours[0].tolist() == theirs[0].tolist()
        torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)


def test_losses_and_gradients(config):
    video, question = random_video(config, batch=3), random_text(config, 3, 6)
    answers = (*random_text(config, 5, 4, seed=2), torch.tensor([2, 0, 3]), torch.rand(5))
    for task, inputs in (
        ("captioning", random_text(config, 3, 7, seed=4)),
        ("question_answering", (*question, *answers)),
    ):
        reference, fast = pair(config, task)  # eval mode: no dropout
        losses = [model(video, *inputs) for model in (reference, fast)]
        torch.testing.assert_close(losses[1], losses[0], atol=0, rtol=1e-5)
        for loss in losses:
            loss.backward()
        gradients = fast.official_gradients()
        for key, gradient in reference.official_gradients().items():
            if gradient is not None and gradient.norm() > 1e-4:
                assert relative_error(gradients[key], gradient) < 1e-4, key


def test_text_padding_does_not_matter():
    _, fast = pair(SMALL, "question_answering")
    video, (ids, mask) = random_video(SMALL), random_text(SMALL, 2, 6, padded=False)
    padded = torch.nn.functional.pad(ids, (0, 3), value=0), torch.nn.functional.pad(mask, (0, 3))
    plain = fast.generate(video, question_ids=ids, question_mask=mask)
    longer = fast.generate(video, question_ids=padded[0], question_mask=padded[1])
    assert plain.sequences.tolist() == longer.sequences.tolist()
    torch.testing.assert_close(plain.scores, longer.scores, atol=1e-5, rtol=1e-5)


def test_videos_of_a_batch_do_not_see_each_other():
    _, fast = pair(SMALL, seed=3, scale=2.0)
    video = random_video(SMALL, batch=3)
    together = fast.generate(video, num_return=2)
    for i in range(3):
        alone = fast.generate(video[i : i + 1], num_return=2)
        torch.testing.assert_close(alone.scores[0], together.scores[i], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_eager(dtype):
    reference, fast = pair(SMALL)
    video = random_video(SMALL)
    with torch.no_grad():
        exact = reference.double().encode_video(video.double())
        eager = relative_error(reference.to(dtype).encode_video(video.to(dtype)), exact)
        ours = relative_error(fast.to(dtype).encode_video(video), exact)
    assert ours < 2 * eager + 1e-3
    assert fast.generate(video).sequences.shape[0] == 2


@pytest.mark.parametrize("library", [mf.reference, mf], ids=["reference", "fast"])
def test_generation_never_drops_out_and_leaves_the_mode(library):
    config = SMALL.replace(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = randomise(library.MPlug2ForQuestionAnswering(config))
    video, question, answers = random_video(config), random_text(config, 2, 5), random_text(config, 4, 4, seed=1)

    def outcomes():
        generated = model.generate(video, question_ids=question[0], question_mask=question[1])
        return generated.sequences.tolist(), model.rank_answers(video, *question, *answers, 3)[0].tolist()

    expected = outcomes()
    model.train()
    (model.visn_emb_norm if library is mf.reference else model.visual).eval()
    modes = [module.training for module in model.modules()]
    assert outcomes() == expected
    assert [module.training for module in model.modules()] == modes


def test_dropout_is_on_when_training_and_in_modules_that_can_be_switched_off():
    config = SMALL.replace(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = randomise(mf.MPlug2ForCaptioning(config)).train()
    inputs = random_video(config), *random_text(config, 2, 6)
    assert model(*inputs) != model(*inputs)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert model(*inputs) == model(*inputs)


@pytest.mark.parametrize("library", [mf.reference, mf], ids=["reference", "fast"])
def test_counts_may_be_a_list_and_ids_int32(library):
    model = randomise(library.MPlug2ForQuestionAnswering(SMALL))
    video, question, answers = random_video(SMALL), random_text(SMALL, 2, 5), random_text(SMALL, 3, 4, seed=1)
    weights = torch.rand(3)
    expected = model(video, *question, *answers, torch.tensor([1, 2]), weights)
    narrow = [t.int() for t in (*question, *answers)]
    torch.testing.assert_close(model(video, *narrow, [1, 2], weights), expected)


def test_an_empty_batch_encodes_to_nothing():
    model = randomise(mf.MPlug2ForCaptioning(SMALL))
    with torch.no_grad():
        assert model.encode_video(torch.zeros(0, 3, 4, 32, 32)).shape == (0, 65, 64)


def test_only_what_the_task_uses_is_built():
    captioning, answering = (
        set(kind(SMALL, device="meta").official_parameters())
        for kind in (mf.MPlug2ForCaptioning, mf.MPlug2ForQuestionAnswering)
    )
    assert captioning < answering
    assert not any(key.startswith("fusion_encoder") for key in captioning)
    assert not any("text_encoder.embeddings" in key for key in captioning)


def test_a_captioner_shares_the_parameters():
    model = randomise(mf.MPlug2ForQuestionAnswering(SMALL))
    captioner = model.captioner()
    assert {id(p) for p in captioner.parameters()} < {id(p) for p in model.parameters()}
    standalone = randomise(mf.MPlug2ForCaptioning(SMALL))
    video = random_video(SMALL)
    assert captioner.generate(video).sequences.tolist() == standalone.generate(video).sequences.tolist()


def test_precomputed_image_embeds():
    _, fast = pair(SMALL)
    video = random_video(SMALL)
    with torch.no_grad():
        embeds = fast.encode_video(video)
    assert fast.generate(image_embeds=embeds).sequences.tolist() == fast.generate(video).sequences.tolist()
    with pytest.raises(ValueError, match="either video or image_embeds"):
        fast.generate()


def test_large_on_meta_has_the_known_size():
    model = mf.MPlug2ForCaptioning(mf.MPlug2Config.preset("large"), device="meta", dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    assert round(parameters / 1e6) == 622
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not list(model.buffers())


def test_fresh_temporal_modules_are_the_identity():
    model = mf.MPlug2ForCaptioning(SMALL)
    x = torch.randn(2, 4, 1 + SMALL.vision.num_patches, 64)
    assert torch.equal(model.visual.blocks[0].lmhra1(x), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(random_video(SMALL), num_beams=0), "at least 1"),
        (lambda m: m.generate(random_video(SMALL), max_length=33), "max_length must be from 1 to 32, got 33"),
        (lambda m: m.encode_video(torch.zeros(3, 4, 32, 32)), "batch, 3, frames"),
        (lambda m: m.encode_video(torch.zeros(1, 3, 4, 40, 40)), "40×40 pixels, the model was built for 32×32"),
        (lambda m: m.encode_video(torch.zeros(1, 3, 4, 33, 32)), "33×32 pixels"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(mf.MPlug2ForCaptioning(SMALL).eval())


def test_padded_pixels_are_the_same_and_zeros():
    pixels = torch.randn(2, 3, 3, 4, 5, 4, 5).permute(0, 2, 3, 5, 1, 4, 6)
    rows = padded(pixels, 4)
    assert torch.equal(rows[..., :75], pixels.flatten(4))
    assert rows.shape == (2, 3, 4, 4, 79)
    assert not rows[..., 75:].any()
