"""Decoders with 8-bit weights, step by step."""

import copy
from pathlib import Path

import pytest
import torch

from mplug2_fast.nn.bert_layer import Int8KeysValues, KeysValues
from mplug2_fast.nn.int8 import Int8Embedding, Int8Linear
from mplug2_fast.nn.quantise import quantise
from mplug2_fast.nn.text_decoder import TextDecoder
from mplug2_fast.predict import Captioner
from tests.tiny import SMALL

CLIPS = sorted((Path(__file__).parents[2] / "examples/moving_shapes/clips").glob("*.mp4"))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    decoder = TextDecoder(SMALL.text, SMALL.text.text_decode_layers).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return decoder


def steps(decoder, step_by=None, dtype=torch.float32):
    """The logits of four steps, and how they were computed."""
    generator = torch.Generator().manual_seed(1)
    batch, beams, length = 2, 3, 4
    states = torch.randn(batch, 7, decoder.config.hidden_size, generator=generator)
    memory, found = decoder.remember(states.to(dtype)), []
    memory.step_by = step_by
    cache = decoder.new_cache(batch, beams, length)
    for step in range(length):
        tokens = torch.randint(decoder.config.vocab_size, (batch, beams), generator=generator)
        found.append(decoder.step(tokens, step, cache, memory))
        rows = torch.randint(beams, (batch, beams), generator=generator)
        cache.reorder((rows + beams * torch.arange(batch)[:, None]).flatten(), step + 1)
    return torch.stack(found), memory.step_by


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ways_to_step_agree(decoder, dtype):
    wide, _ = steps(decoder)
    names = quantise(decoder, 16)
    decoder.to(dtype)
    assert "embeddings.word" in names
    logits, way = steps(decoder, dtype=dtype)
    assert (way, logits.dtype) == ("layer", dtype)
    for other in ("part", "sequence"):
        assert relative(steps(decoder, other, dtype)[0], logits) < 1e-2
    assert relative(logits, wide) < (0.02 if dtype is torch.float32 else 0.03)


@pytest.mark.parametrize(
    ("kept", "way"),
    [
        ("layers.0.", "layer"),
        ("embeddings.word", "layer"),
        ("head", "layer"),
        ("layers.1.output.dense", "part"),
        ("layers.0.crossattention.self.in_proj", "part"),
    ],
)
def test_mixed_decoders(decoder, kept, way):
    """Every layer as a whole may stay wide, and so may the words and the head."""
    wide, _ = steps(decoder)
    names = quantise(decoder, 16, keep=lambda name: name.startswith(kept))
    assert names
    assert not any(name.startswith(kept) for name in names)
    logits, chosen = steps(decoder)
    assert chosen == way
    assert relative(steps(decoder, "sequence")[0], logits) < 1e-4
    assert relative(logits, wide) < 0.02


def test_a_watched_layer_is_called(decoder):
    quantise(decoder, 16)
    expected, _ = steps(decoder)
    calls = []
    decoder.layers[0].output.dense.register_forward_hook(lambda *_: calls.append(1))
    logits, way = steps(decoder)
    assert (way, len(calls)) == ("part", 4)
    assert relative(logits, expected) < 1e-4


def test_words(decoder):
    """Looked up and scored with one table, which follows the model's dtype, but not its scales."""
    table = copy.deepcopy(decoder.embeddings.word.weight)
    quantise(decoder, 16)
    word = decoder.to(torch.bfloat16).embeddings.word
    assert isinstance(word, Int8Embedding)
    assert (word.weight.dtype, word.scale.dtype) == (torch.int8, torch.float32)
    ids = torch.tensor([[3, 199], [0, 3]])
    assert word(ids).dtype == torch.bfloat16
    assert relative(word(ids), table[ids]) < 0.02
    assert decoder.embeddings(ids).dtype == torch.bfloat16


def test_the_tiny_model_says_the_same():
    """Its captions of the example clips."""
    wide = Captioner(dtype="float32", device="cpu")
    model = copy.deepcopy(wide.model)
    names = quantise(model.visual) + quantise(model.universal) + quantise(model.decoder, 16)
    assert sum(isinstance(each, (Int8Linear, Int8Embedding)) for each in model.modules()) == len(names)
    assert len(CLIPS) == 6
    both = wide, Captioner(model, wide.tokenizer)
    expected, found = ([result.text for result in captioner.caption(CLIPS)] for captioner in both)
    assert found == expected


def test_keys_and_values_of_8_bit_layers_are_8_bit_numbers(decoder):
    quantise(decoder, 16, keep=lambda name: name.startswith("layers.1.crossattention.self"))
    memory = decoder.remember(torch.randn(2, 7, decoder.config.hidden_size))
    assert [type(each) for each in memory.keys_values] == [Int8KeysValues, KeysValues]
    narrow, wide = memory.select(slice(1, 2)).keys_values
    assert type(narrow) is Int8KeysValues
    assert narrow.keys.dtype == torch.int8
    assert len(narrow.values) == len(narrow.key_scale) == len(wide.keys) == 1
    exact = KeysValues.of(decoder.layers[0].crossattention.self, memory.states)
    for found, states in zip(memory.keys_values[0].wide(), exact.wide(), strict=True):
        assert relative(found, states) < 0.01
