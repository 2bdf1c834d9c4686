"""The peer must compute what the reference computes, or its times mean nothing."""

import pytest
import torch
from torch.testing import assert_close

from bench.peer import Peer
from bench.weights import fill
from mplug2_fast import MPlug2Config
from mplug2_fast.config import SEP_TOKEN_ID
from mplug2_fast.reference import MPlug2ForCaptioning as ReferenceForCaptioning

TINY = MPlug2Config.preset("tiny")


def build(config, end_bias=0.0):
    """Reference and peer with the same weights, and two videos."""
    reference = ReferenceForCaptioning(config, device="meta").to_empty(device="cpu").eval()
    peer = Peer(config)
    for model in (reference, peer):
        parameters = model.released_parameters()
        fill(parameters)
        parameters["text_decoder.cls.predictions.bias"][SEP_TOKEN_ID] += end_bias
    size = config.vision.image_size
    video = torch.randn(2, 3, 4, size, size, generator=torch.Generator().manual_seed(3))
    return reference, peer, video


@pytest.mark.parametrize(
    "changes", [{}, {"width": 64}, {"temporal_downsampling": True}], ids=["tiny", "projected", "downsampled"]
)
@torch.no_grad()
def test_image_embeds(changes):
    reference, peer, video = build(TINY.replace(**changes))
    assert_close(peer.encode_visual(video), reference.encode_visual(video), rtol=1e-4, atol=1e-4)
    assert_close(peer.encode_video(video), reference.encode_video(video), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("end_bias", [0.0, 3.0, 6.0])
@pytest.mark.parametrize(("beams", "min_length", "max_length"), [(5, 9, 9), (5, 2, 12), (3, 1, 12), (1, 1, 6)])
def test_beam_search(end_bias, beams, min_length, max_length):
    reference, peer, video = build(TINY, end_bias)
    expected = reference.generate(video, num_beams=beams, min_length=min_length, max_length=max_length)
    with torch.no_grad():
        embeds = peer.encode_video(video)
    ids, scores = peer.decode(embeds, beams, min_length, max_length)
    assert torch.equal(ids[:, : expected.sequences.shape[2]], expected.sequences[:, 0])
    assert (ids[:, expected.sequences.shape[2] :] == -1).all()
    assert_close(scores, expected.scores[:, 0], rtol=1e-4, atol=1e-4)


def test_the_end_token_occurs_in_these_searches():
    reference, _, video = build(TINY, end_bias=6.0)
    out = reference.generate(video, num_beams=5, min_length=2, max_length=12)
    assert (out.sequences == SEP_TOKEN_ID).any()


def test_one_compilation_serves_all_layers_of_a_kind():
    """With the tracing and functionalisation of torch.compile, but no code generation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reference, peer, video = build(TINY.replace(layers=10, text_decode_layers=10))
    peer.compile(backend="aot_eager")
    expected = reference.generate(video, num_beams=5, min_length=4, max_length=4)
    with torch.no_grad():
        embeds = peer.encode_video(video)
    for _ in range(2):
        ids, scores = peer.decode(embeds, 5, 4, 4)
        assert torch.equal(ids, expected.sequences[:, 0])
        assert_close(scores, expected.scores[:, 0], rtol=1e-4, atol=1e-4)
    # Vision block, the universal layers' two shapes, decoder layer, head with beam step.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5
    torch._dynamo.reset()
