"""The cached step against teacher forcing, with beams that are reordered."""

import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.nn.text_decoder import TextDecoder
from tests.ops.suite import TRITON_DEVICE, device
from tests.tiny import SMALL


@pytest.mark.parametrize("backend", [None, "torch", *(["triton"] if TRITON_DEVICE else [])])
def test_steps_of_reordered_beams(backend):
    torch.manual_seed(0)
    where = device(backend)
    decoder = TextDecoder(SMALL.text, SMALL.text.text_decode_layers).to(where).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config, batch, beams, length = decoder.config, 2, 3, 4
    memory = decoder.remember(torch.randn(batch, 7, config.hidden_size, device=where))
    states = decoder.new_cache(batch, beams, length)
    sequences = torch.empty(batch, beams, 0, dtype=torch.long, device=where)
    for step in range(length):
        tokens = torch.randint(config.vocab_size, (batch, beams), device=where)
        sequences = torch.cat([sequences, tokens[..., None]], dim=-1)
        with torch.no_grad():
            expected = decoder(sequences, torch.ones_like(sequences), memory)[:, :, -1]
            with ops.use_backend(backend) if backend else torch.no_grad():
                logits = decoder.step(tokens, step, states, memory)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        origin = torch.randint(beams, (batch, beams), device=where)
        sequences = sequences.gather(1, origin[:, :, None].expand_as(sequences))
        states.reorder((origin + beams * torch.arange(batch, device=where)[:, None]).flatten(), step + 1)
