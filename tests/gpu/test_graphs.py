"""Generation and features by CUDA graphs, as without them."""

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast.generation.cuda_graphs import MAX_CACHED_GRAPHS

pytestmark = pytest.mark.gpu

TINY = Path(mf.__file__).parent / "data" / "tiny"
OPTIONS = {"num_beams": 5, "num_return": 2, "min_length": 2, "max_length": 12}


@pytest.fixture
def model():
    return mf.from_pretrained(TINY, task="captioning", device="cuda")


def videos(count, seed, frames=4):
    return torch.randn(count, 3, frames, 32, 32, generator=torch.Generator().manual_seed(seed)).cuda()


def without_graphs(model, *arguments, **options):
    model.cuda_graphs = False
    out = model.generate(*arguments, **options)
    model.cuda_graphs = True
    return out


def captured(model):
    return [entry for entry in model._graphs._captured.values() if entry is not None]


def assert_same(actual, expected):
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("options", [OPTIONS, {"num_beams": 1, "max_length": 9}, {"num_beams": 3, "max_length": 1}])
def test_captions(model, count, options):
    expected = [without_graphs(model, videos(count, seed), **options) for seed in range(4)]
    found = [model.generate(videos(count, seed), **options) for seed in range(4)]
    assert len(captured(model)) == 1
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_from_features(model):
    with torch.no_grad():
        embeds = [model.encode_video(videos(2, seed)) for seed in range(4)]
        again = model.encode_video(videos(2, 0))
    torch.testing.assert_close(again, embeds[0])  # which later calls have not overwritten
    for each in embeds[:3]:
        assert_same(model.generate(image_embeds=each, **OPTIONS), without_graphs(model, image_embeds=each, **OPTIONS))


def test_questions():
    model = mf.from_pretrained(TINY, task="question_answering", device="cuda")
    ids = torch.randint(110, 250, (2, 7), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    for seed in range(3):
        given = {"question_ids": ids, "question_mask": mask, "max_length": 5}
        expected = without_graphs(model, videos(2, seed), **given)
        model.generate(videos(2, 9), **given)
        assert_same(model.generate(videos(2, seed), **given), expected)


def test_weights_that_change(model):
    for seed in range(2):
        model.generate(videos(1, seed), **OPTIONS)
    with torch.no_grad():
        for parameter in model.decoder.parameters():  # where they are
            parameter.mul_(1.25)
    assert_same(model.generate(videos(1, 5), **OPTIONS), without_graphs(copy.deepcopy(model), videos(1, 5), **OPTIONS))
    before = captured(model)
    model.decoder.head_bias = torch.nn.Parameter(torch.randn_like(model.decoder.head_bias))  # and elsewhere
    expected = without_graphs(copy.deepcopy(model), videos(1, 5), **OPTIONS)
    assert_same(model.generate(videos(1, 5), **OPTIONS), expected)
    assert captured(model) != before


def test_who_wants_to_see_operations_sees_them(model):
    for seed in range(2):
        model.generate(videos(1, seed), **OPTIONS)
    seen = []
    model.visual.register_forward_hook(lambda *_: seen.append(1))
    model.generate(videos(1, 3), **OPTIONS)
    assert seen == [1]


def test_in_inference_mode_and_outside_of_it(model):
    expected = without_graphs(model, videos(1, 4), **OPTIONS)
    for mode in (True, False, True):
        for seed in (0, 1, 4):
            with torch.inference_mode(mode):
                found = model.generate(videos(1, seed), **OPTIONS)
        assert_same(found, expected)


def test_copies_start_without_graphs(model):
    for seed in range(2):
        model.generate(videos(1, seed), **OPTIONS)
    expected = model.generate(videos(1, 7), **OPTIONS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not captured(twin)
        assert_same(twin.generate(videos(1, 7), **OPTIONS), expected)


def test_other_streams_and_threads(model):
    expected = [without_graphs(model, videos(1, seed), **OPTIONS) for seed in range(8)]
    for seed in range(2):
        model.generate(videos(1, seed), **OPTIONS)
    found = [None] * 8

    def work(first):
        with torch.cuda.stream(torch.cuda.Stream()):
            for seed in range(first, 8, 2):
                found[seed] = model.generate(videos(1, seed), **OPTIONS)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_no_more_than_some_are_kept(model):
    for count in range(1, MAX_CACHED_GRAPHS + 3):
        for seed in range(2):
            model.generate(videos(count, seed), num_beams=2, max_length=2)
    assert len(captured(model)) == MAX_CACHED_GRAPHS
