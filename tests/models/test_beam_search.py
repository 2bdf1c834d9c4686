"""The search on the device against the official one, with scripted scores where videos end early."""

from types import SimpleNamespace

import pytest
import torch

from mplug2_fast.generation.beam_search import beam_search, output
from mplug2_fast.models.config import CLS_TOKEN_ID, SEP_TOKEN_ID
from mplug2_fast.nn.text_decoder import Memory
from mplug2_fast.reference.decoder import beam_search as released_beam_search

VIDEOS, STEPS, WORDS = 6, 6, SEP_TOKEN_ID + 3


class Scripted:
    """A decoder whose logits `(words,)` follow from the video, the step and the newest word alone."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Sure of itself, so that a beam that goes on may end with a better score than one that has ended.
        self.table = 8 * torch.randn(VIDEOS, STEPS, WORDS, WORDS, generator=generator)
        self.table[..., SEP_TOKEN_ID] += 12 * torch.rand(VIDEOS, STEPS, 1, generator=generator)

    def new_cache(self, batch, beams, max_length, device):
        return SimpleNamespace(reorder=lambda rows, length: None)

    def step(self, tokens, step, cache, memory):
        return self.table[torch.arange(VIDEOS)[:, None], step, tokens]

    def next_logits(self, sequences, alive):
        videos = alive.repeat_interleave(len(sequences) // len(alive))
        return self.table[videos, sequences.shape[1] - 1, sequences[:, -1]]


@pytest.mark.parametrize("num_return", [1, 4])
@pytest.mark.parametrize("min_length", [0, 2])
@pytest.mark.parametrize("num_beams", [1, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_the_released_search(seed, num_beams, min_length, num_return):
    decoder = Scripted(seed)
    options = {"num_beams": num_beams, "min_length": min_length, "max_length": STEPS}
    memory = Memory(torch.zeros(VIDEOS, 1, 1), None, [None], [None])
    out = output(
        next(
            found
            for ended, found in beam_search(
                decoder,
                memory,
                start=(CLS_TOKEN_ID,),
                end_token_id=SEP_TOKEN_ID,
                num_return=num_return,
                **options,
            )
            if ended
        ),
        (CLS_TOKEN_ID,),
    )
    expected = released_beam_search(
        decoder.next_logits,
        VIDEOS,
        device=torch.device("cpu"),
        **options,
    )
    ended_at = {len(hypotheses[-1][1]) for hypotheses in expected}
    assert len(ended_at) > 1 or num_beams == 1  # videos end at different steps
    for video, hypotheses in enumerate(expected):
        for rank, (score, ids) in enumerate(hypotheses[:num_return]):
            assert out.scores[video, rank].item() == pytest.approx(score, rel=1e-5, abs=1e-5)
            assert [i for i in out.sequences[video, rank].tolist() if i >= 0] == ids.tolist()
        assert torch.isneginf(out.scores[video, len(hypotheses) :]).all()
        assert (out.sequences[video, len(hypotheses) :] == -1).all()
