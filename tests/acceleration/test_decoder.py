"""What the decoder keeps between calls never changes the result of a later call."""

import threading
from contextlib import contextmanager

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast.acceleration import text_decoder
from mplug2_fast.acceleration.bert_attention import Projections
from mplug2_fast.acceleration.swap import STATE
from tests.acceleration.official import MPLUG2
from tests.golden.cases import CAPTIONING, GoldenCase, relative_error

CASE = GoldenCase(CAPTIONING[0])
BEAMS, KEYS, WIDTH, WORDS = 3, 11, 128, 400


@pytest.fixture
def plain():
    return MPLUG2.of(CASE).text_decoder


@pytest.fixture
def fast():
    decoder = MPLUG2.of(CASE).text_decoder
    mf.accelerate(decoder)
    return decoder


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(*shape, seed=0):
    return torch.randint(3, WORDS, shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def counted():
    """Counts tokens in layers, rows of memory in cross-attention, and tokens in heads."""
    counts = {"tokens": 0, "memory": 0, "logits": 0}
    originals = Projections.finish, Projections.key_value, text_decoder._logits

    def finish(self, context, residual):
        counts["tokens"] += residual.shape[0] * residual.shape[1]
        return originals[0](self, context, residual)

    def key_value(self, x):
        counts["memory"] += x.shape[0] if x.shape[1] == KEYS else 0
        return originals[1](self, x)

    def logits(head, found, x, *embeddings):
        counts["logits"] += x.shape[0] * x.shape[1]
        return originals[2](head, found, x, *embeddings)

    Projections.finish, Projections.key_value, text_decoder._logits = finish, key_value, logits
    try:
        yield counts
    finally:
        Projections.finish, Projections.key_value, text_decoder._logits = originals


@torch.no_grad()
def call(decoder, ids, memory, mask=None, **options):
    return decoder(ids, encoder_hidden_states=memory, encoder_attention_mask=mask, return_dict=True, **options)


def check(plain, fast, ids, memory, mask=None, **options):
    """Compares the logits of all tokens with the original's. Returns what was computed."""
    expected = call(plain, ids, memory, mask, **options).logits
    with counted() as counts:
        actual = call(fast, ids, memory, mask, **options).logits
    assert relative_error(actual, expected) < 1e-5
    return counts


def tiled(videos, seed=0):
    return random(videos, KEYS, WIDTH, seed=seed).repeat_interleave(BEAMS, dim=0)


def extended(ids, rows, seed):
    """Prefixes with one more token than the given rows."""
    return torch.cat([ids[rows], words(len(rows), 1, seed=seed)], dim=1)


@pytest.mark.parametrize("inference", [False, True])
def test_steps_with_beams_in_any_order(plain, fast, inference):
    generator = torch.Generator().manual_seed(0)
    base = random(2, KEYS, WIDTH)
    ids = torch.full((2 * BEAMS, 1), 101)
    layers = len(fast.bert.encoder.layer)
    with torch.inference_mode(inference):
        for step in range(7):
            memory = base.repeat_interleave(BEAMS, dim=0)
            counts = check(plain, fast, ids, memory)
            # Two sub-layers a token; the first step computes the keys and values of two videos, not of six rows.
            assert counts == {"tokens": 2 * layers * 6, "memory": 0 if step else 2 * layers, "logits": 6}
            rows = torch.randint(BEAMS, (2, BEAMS), generator=generator) + torch.tensor([[0], [BEAMS]])
            ids = extended(ids, rows.flatten(), step)


@pytest.mark.parametrize(
    "order", [[0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 0], [1, 1, 1], [0, 1]], ids=str
)
def test_rows_of_a_memory_in_any_order(plain, fast, order):
    base, index = random(2, KEYS, WIDTH), torch.tensor([0, 0, 0, 1, 1, 1])
    ids = words(6, 1)
    check(plain, fast, ids, base[index])
    rows = torch.tensor([{0: 0, 1: 3}[i] for i in order])
    counts = check(plain, fast, extended(ids, rows, 1), base[torch.tensor(order)])
    assert counts["memory"] == 0
    assert counts["logits"] == len(order)


def test_beams_of_different_videos_with_the_same_tokens(plain, fast):
    ids = words(1, 3).expand(6, 3).contiguous()
    memory = tiled(2)
    for length in (1, 2, 3):
        counts = check(plain, fast, ids[:, :length], memory)
        assert counts["logits"] == 6
    check(plain, fast, extended(ids, torch.tensor([3, 4, 5, 0, 1, 2]), 1), memory.roll(3, 0))


def test_the_same_memory_object_is_not_compared(plain, fast, monkeypatch):
    memory, ids = tiled(2), words(6, 1)
    check(plain, fast, ids, memory)
    monkeypatch.setattr("mplug2_fast.acceleration.cache._match", None)
    assert check(plain, fast, extended(ids, torch.arange(6), 1), memory)["memory"] == 0


@pytest.mark.parametrize("inference", [False, True])
def test_a_memory_written_in_place(plain, fast, inference):
    with torch.inference_mode(inference):
        memory, ids = tiled(2).clone(), words(6, 1)
        check(plain, fast, ids, memory)
        memory[0, -1, -1] += 1  # one row of its video, which is another now
        assert check(plain, fast, extended(ids, torch.arange(6), 1), memory)["memory"] == 3 * 2


def test_memories_that_differ_in_one_value_only(plain, fast):
    memory = tiled(1)
    memory[1, 7, 5] += 1e-3
    counts = check(plain, fast, words(3, 1), memory)
    assert counts["memory"] == 2 * len(fast.bert.encoder.layer)
    assert check(plain, fast, extended(words(3, 1), torch.arange(3), 1), memory)["memory"] == 0


def test_a_memory_with_nan(fast):
    memory = tiled(2)
    memory[:3] = torch.nan
    ids = words(6, 1)
    for step in range(3):
        logits = call(fast, ids, memory).logits
        assert logits[:3].isnan().all()
        assert logits[3:].isfinite().all()
        ids = extended(ids, torch.arange(6), step)


def test_padding_of_the_memory(plain, fast):
    memory, ids = tiled(2), words(6, 1)
    masks = [torch.ones(6, KEYS), torch.ones(6, KEYS), torch.ones(6, KEYS)]
    masks[0][3:, 8:] = 0
    masks[1][3:, 8:] = 0
    masks[2][3:, 7:] = 0
    computed = []
    for step, mask in enumerate(masks):
        computed.append(check(plain, fast, ids, memory, mask)["memory"])
        ids = extended(ids, torch.arange(6), step)
    assert computed == [4, 0, 4]
    check(plain, fast, ids[:3], memory[:3], masks[2][:3])
    masks[2][1, 3] = 0  # one video with several paddings
    check(plain, fast, ids, memory, masks[2])


def test_padding_of_the_tokens(plain, fast):
    memory, ids = tiled(2), words(6, 5)
    mask = torch.ones(6, 5)
    mask[1, 2:], mask[4, 4:] = 0, 0
    for length in (1, 2, 3, 4, 5):
        check(plain, fast, ids[:, :length], memory, attention_mask=mask[:, :length])
    mask[2, 1] = 0
    longer = torch.cat([mask, torch.ones(6, 1)], dim=1)
    check(plain, fast, extended(ids, torch.arange(6), 1), memory, attention_mask=longer)


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("then", [1, 2, 4, 5])
def test_prefixes_of_any_length(plain, fast, first, then):
    ids, memory = words(6, 6), tiled(2)
    check(plain, fast, ids[:, :first], memory)
    counts = check(plain, fast, ids[:, :then], memory)
    goes_on = first == 1 and then > first  # the large things of longer starts are not kept
    assert counts["logits"] == 6 * (then - first if goes_on else then)
    assert (counts["memory"] == 0) is goes_on
    if then == 4 > first:
        assert check(plain, fast, ids[:, :5], memory) == {"tokens": 2 * 2 * 6, "memory": 0, "logits": 6}


def test_prefixes_that_continue_nothing(plain, fast):
    memory = tiled(2)
    check(plain, fast, words(6, 2), memory)
    other = extended(words(6, 2), torch.arange(6), 1)
    other[4, 0] = 7
    assert check(plain, fast, other, memory)["logits"] == 18


def test_positions_and_token_types_count(plain, fast):
    memory, ids = tiled(2), words(6, 1)
    check(plain, fast, ids, memory)
    longer = extended(ids, torch.arange(6), 1)
    assert check(plain, fast, longer, memory, position_ids=torch.tensor([[3, 4]]))["logits"] == 12
    types = torch.ones(6, 3, dtype=torch.long)
    assert check(plain, fast, extended(longer, torch.arange(6), 2), memory, token_type_ids=types)["logits"] == 18


def test_without_the_causal_mask(plain, fast):
    ids, memory = words(6, 4), tiled(2)
    for length in (1, 2, 3, 4):
        check(plain, fast, ids[:, :length], memory, is_decoder=False)


def test_one_memory_for_all_rows_runs_the_original_code(plain, fast):
    memory, ids = random(1, KEYS, WIDTH), words(4, 3)
    with pytest.warns(RuntimeWarning, match="do not have the same batch size"):
        check(plain, fast, ids, memory)


def test_no_rows(fast):
    assert call(fast, words(0, 3), random(0, KEYS, WIDTH)).logits.shape == (0, 3, WORDS)


def test_results_and_inputs_that_the_caller_writes_to(plain, fast):
    memory, ids = tiled(2), words(6, 1)
    kept = []
    for step in range(4):
        expected = call(plain, ids, memory, output_hidden_states=True).logits
        output = call(fast, ids, memory, output_hidden_states=True)
        assert relative_error(output.logits, expected) < 1e-5
        kept.append((output.logits, output.logits.clone()))
        ids = extended(ids, torch.arange(6), step)
    assert all(torch.equal(a, b) for a, b in kept)
    for logits, _ in kept:
        logits.fill_(1.0)
    for state in output.hidden_states:
        state.fill_(2.0)
    check(plain, fast, ids, memory)


def test_other_outputs_that_a_call_may_request(plain, fast):
    ids, memory = words(6, 3), tiled(2)
    check(plain, fast, ids[:, :2], memory)
    options = {"use_cache": True, "output_hidden_states": True}
    expected, actual = (call(decoder, ids, memory, **options) for decoder in (plain, fast))
    pairs = list(zip(actual.hidden_states, expected.hidden_states, strict=True))
    pairs += [
        (a, e)
        for layers in zip(actual.past_key_values, expected.past_key_values, strict=True)
        for a, e in zip(*layers, strict=True)
    ]
    assert len(pairs) == 3 + 4
    assert all(relative_error(a, e) < 1e-5 for a, e in pairs)

    with torch.no_grad():
        labels = ids.clone()
        for options in ({"labels": labels}, {"return_logits": True}, {"return_dict": False}, {"is_decoder": False}):
            given = {"encoder_hidden_states": memory, **options}
            expected, actual = (decoder(ids, **given) for decoder in (plain, fast))
            if "labels" in options:
                assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
            else:
                expected, actual = (out if torch.is_tensor(out) else out[0] for out in (expected, actual))
                assert relative_error(actual, expected) < 1e-5

    with pytest.warns(RuntimeWarning, match="output_attentions"):
        check(plain, fast, ids, memory, output_attentions=True)


def test_keys_and_values_kept_by_the_caller(plain, fast):
    ids, memory = words(6, 2), tiled(2)
    given = [call(decoder, ids[:, :1], memory, use_cache=True).past_key_values for decoder in (plain, fast)]
    expected = call(plain, ids[:, 1:], memory, past_key_values=given[0]).logits
    with pytest.warns(RuntimeWarning, match="past_key_value"):
        actual = call(fast, ids[:, 1:], memory, past_key_values=given[1]).logits
    assert relative_error(actual, expected) < 1e-5


def test_nothing_is_kept_for_training_or_for_gradients(fast):
    session, ids, memory = vars(fast)[STATE].session, words(6, 2), tiled(2)
    assert all(vars(layer)[STATE].session is session for layer in fast.bert.encoder.layer)

    def generate():
        call(fast, ids[:, :1], memory)
        assert not session.is_empty

    generate()
    fast.train()
    assert session.is_empty
    call(fast, ids, memory)
    assert session.is_empty
    fast.eval()
    generate()
    out = fast(ids, encoder_hidden_states=memory.requires_grad_()).logits
    assert session.is_empty
    out.sum().backward()
    assert memory.grad is not None
    memory = memory.detach()
    generate()
    mf.restore(fast)
    assert session.is_empty


def test_the_memory_of_another_video_replaces_the_first(plain, fast):
    for seed in range(2):
        memory, ids = tiled(2, seed), words(6, 1, seed=seed)
        for step in range(2):
            check(plain, fast, ids, memory)
            ids = extended(ids, torch.arange(6), step)
    videos = vars(fast)[STATE].session._seen.videos
    assert videos.memory.shape == (2, KEYS, WIDTH)
    assert len(videos.records) == len(fast.bert.encoder.layer) + 1
    assert all(record.x.shape == (6, 2, WIDTH) for record in videos.records.values())


def test_threads(fast):
    """Two generations that interleave in any way are correct."""
    inputs = [(tiled(2, seed), words(6, 6, seed=seed)) for seed in range(2)]
    expected = []
    for memory, ids in inputs:
        expected.append([call(fast, ids[:, :length], memory).logits for length in range(1, 7)])
    errors = []

    def generate(memory, ids, results):
        for _ in range(5):
            for length, result in enumerate(results, 1):
                errors.append(relative_error(call(fast, ids[:, :length], memory).logits, result))

    threads = [threading.Thread(target=generate, args=(*given, e)) for given, e in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 60
    assert max(errors) < 1e-5


def test_a_long_list_of_answers_to_one_video(plain, fast):
    memory = random(1, KEYS, WIDTH)
    assert check(plain, fast, torch.full((1, 1), 101), memory)["memory"] == 2
    answers = words(20, 5)
    answers[:, 0] = 101
    assert check(plain, fast, answers, memory.expand(20, -1, -1))["memory"] == 0
