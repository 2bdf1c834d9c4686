"""Training the fast model equals training the reference."""

import pytest
import torch

import mplug2_fast as mf
from tests.tiny import SMALL, pair, random_text, random_video
from tests.tolerance import relative


@pytest.mark.parametrize("vision", [SMALL, SMALL.replace(width=128, temporal_kernel_size=5)], ids=["small", "wider"])
def test_five_steps_end_where_the_reference_ends(vision):
    """The biases of keys are left out: a shift of all scores of a query changes nothing, so their gradient is zero, and
    AdamW makes steps of the rounding that is there instead."""
    models = pair(vision, seed=5)
    batches = [(random_video(vision, seed=i), *random_text(vision, 2, 7, seed=i)) for i in range(5)]
    losses = []
    for model in models:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
        losses.append([])
        for batch in batches:
            optimizer.zero_grad()
            loss = model(*batch)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    reference, fast = (model.eval() for model in models)
    expected, width = reference.official_parameters(), vision.vision.width
    for name, parameter in fast.official_parameters().items():
        if name.endswith("key.bias"):
            continue
        rows = torch.ones(len(parameter), dtype=torch.bool)
        if name.endswith("in_proj_bias"):
            rows[width : 2 * width] = False
        assert relative(parameter[rows], expected[name][rows].double()) < 1e-4, name
    video = random_video(vision, seed=9)
    with torch.no_grad():
        assert relative(fast.encode_video(video), reference.encode_video(video).double()) < 1e-4


@pytest.mark.parametrize(("prompt", "ignored"), [("", 0), ("film", 0), ("a video of", 2)])
def test_the_last_token_of_the_prompt_is_learned(prompt, ignored):
    config = SMALL.replace(prompt=prompt)
    ids, mask = random_text(config, 2, 7)
    video = random_video(config)
    for model in pair(config):
        with torch.no_grad():
            if isinstance(model, mf.MPlug2ForCaptioning):
                memory = model.decoder.remember(model.encode_video(video))
                logits = model.decoder(ids[:, None], mask[:, None], memory)[:, 0]
            else:
                logits = model.text_decoder(ids, mask, model.encode_video(video), None)
            log_probs = logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[:, :, 0]
            learned = mask[:, 1:].bool()
            learned[:, :ignored] = False
            assert model(video, ids, mask).item() == pytest.approx(-log_probs[learned].mean().item(), rel=1e-5)
