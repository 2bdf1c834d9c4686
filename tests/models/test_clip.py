"""CLIP's towers inside official files: the reference, gradients, files, and classes by their names."""

import json

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast.clip_tokenizer import MERGES, clip_tokenizer
from mplug2_fast.reference.clip import ClipText
from mplug2_fast.tasks import ZeroShot, features
from mplug2_fast.tasks.features import SPACES
from mplug2_fast.text import Tokenizer
from tests.tiny import SMALL, random_video, randomise

SIZES = {"token_width": 64, "token_layers": 2, "token_heads": 1, "joint_dim": 32}
CONFIG = SMALL.replace(clip=SIZES)
TEXTS = ["a red square", "a photo of the blue circle, which moves to the left", "green"]


@pytest.fixture(scope="module")
def model():
    return randomise(mf.MPlug2(CONFIG, ["clip", "retrieval"]))


def test_it_computes_what_clip_does(model):
    reference = ClipText(CONFIG.clip, CONFIG.vision.width).eval()
    names = {name.removeprefix("visual_encoder."): value for name, value in model.official_parameters().items()}
    reference.load_state_dict({name: names[name] for name in reference.state_dict()})
    ids = clip_tokenizer().encode(TEXTS, 77)
    video = random_video(CONFIG, batch=3)
    with torch.no_grad():
        expected = reference.encode_text(ids)
        torch.testing.assert_close(model.clip.text(ids), expected, rtol=1e-4, atol=1e-5)
        image = reference.encode_image(model.visual(video)[:, 0])
        found = model.predict("clip", video, clip_ids=ids).by_visual
        torch.testing.assert_close(found, image @ expected.T, rtol=1e-4, atol=1e-5)
    frame = random_video(CONFIG, batch=1, frames=1)
    with torch.no_grad():  # a single image passes CLIP's own layers alone
        features = model.predict("clip", frame, clip_ids=ids).by_visual
        token = model.visual(frame, temporal=False)[:, 0]
        torch.testing.assert_close(features, reference.encode_image(token) @ expected.T, rtol=1e-4, atol=1e-5)


def test_files(model, tmp_path):
    mf.checkpoint.save_pretrained(model, tmp_path / "saved")
    found = mf.checkpoint.inspect(tmp_path / "saved", task="clip")
    assert found.ok
    loaded = mf.from_pretrained(tmp_path / "saved", task="clip")
    assert loaded.module_names == {"vision", "universal", "clip"}
    ids = clip_tokenizer().encode(TEXTS, 77)
    torch.testing.assert_close(loaded.clip.text(ids), model.clip.text(ids), rtol=1e-4, atol=1e-5)
    whole = mf.MPlug2(CONFIG, ["captioning", "clip"])
    inferred = mf.checkpoint.infer_config(
        {name: tuple(value.shape) for name, value in whole.official_parameters().items()}
    )
    assert inferred.config.clip == CONFIG.clip
    assert "clip" in inferred.modules


LABELS = ["square", "circle", "star"]


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LABELS]
    return Tokenizer([*words, *(f"[unused{i}]" for i in range(100, 300 - len(words)))])


@pytest.mark.parametrize("space", SPACES)
def test_texts_are_encoded_by_their_lengths(model, tokenizer, space, monkeypatch):
    monkeypatch.setitem(features.TEXT_BATCH, "cpu", 2)
    texts = ["star", "square circle star square", "circle", "square star", "star star star"]
    seen, encode = [], type(SPACES[space])._features
    monkeypatch.setattr(
        type(SPACES[space]), "_features", lambda *given: seen.append(tuple(given[2].shape)) or encode(*given)
    )
    with torch.no_grad():
        together = SPACES[space].texts(model, tokenizer, texts, video=True)
        alone = [SPACES[space].texts(model, tokenizer, [text], video=True) for text in texts]
    torch.testing.assert_close(together, torch.cat(alone))
    end = space == "clip"
    assert seen[:3] == [(2, 2 + end), (2, 4 + end), (1, 5 + end)]


def test_a_gallery_scores_as_the_task_does(model, tokenizer, monkeypatch):
    monkeypatch.setitem(features.TEXT_BATCH, "cpu", 2)
    texts, video = ["star", "square circle star square", "circle", "square star"], random_video(CONFIG, batch=3)
    ids, mask = CONFIG.wording.descriptions(tokenizer, texts, video=True, training=False)
    expected = model.predict("retrieval", video, text_ids=ids, text_mask=mask, k=2)
    gallery = model.tasks["retrieval"].gallery(model, tokenizer, 3, rerank=2)
    with torch.no_grad():
        gallery.add(model.encode_video(video))
    torch.testing.assert_close(gallery.scores(texts), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space", SPACES)
def test_classes_by_their_names(model, tokenizer, space):
    task = ZeroShot(LABELS, space, ["{}", "a photo of a {}"])
    model.tasks[task.name] = task
    video = random_video(CONFIG, batch=3)
    with torch.no_grad():
        classes = task.label_features(model, tokenizer)
        together = model.predict(task, video, label_features=classes)
        torch.testing.assert_close(model.predict(task, video[1:2], label_features=classes)[0], together[1])
        found = task.respond(model, tokenizer, 3)(task.encode(model, video), [None] * 3)
    assert [dict(each)["star"] for each in found] == pytest.approx(together[:, 2].tolist(), abs=1e-5)
    assert torch.allclose(classes.norm(dim=1), torch.ones(3))
    assert mf.tasks.get(mf.tasks.stated(task)).settings() == task.settings()
    del model.tasks[task.name]


def test_the_tokenizer_is_clips(tmp_path):
    transformers = pytest.importorskip("transformers")
    import gzip

    merges = gzip.decompress(MERGES.read_bytes()).decode().split("\n")[1:48895]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "vocab.json").write_text(json.dumps(clip_tokenizer()._tokenizer.get_vocab()))
    theirs = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for text in [*TEXTS, "Isn't it? 12 times!", "naïve café ☕  über\n", "日本語 #3.5%", ""]:
        assert clip_tokenizer().encode([text], 77)[0].tolist() == theirs(text)["input_ids"], text
    assert clip_tokenizer().encode(["a " * 100], 77).shape == (1, 77)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ["a"]}, "from 2 to"),
        ({"labels": ["a", "b"], "space": "sound"}, "space must be one of contrast, clip"),
        ({"labels": ["a", "b"], "templates": ["a photo"]}, "a template has one {}"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(mf.ConfigError, match=message):
        ZeroShot(**arguments)


def test_galleries_refuse_options_of_other_tasks():
    with pytest.raises(mf.ConfigError, match="clip has no option candidates; it has: none"):
        mf.tasks.get("clip").gallery(None, None, rerank=0, candidates=9)
    with pytest.raises(mf.ConfigError, match="clip has no matching head"):
        mf.tasks.get("clip").gallery(None, None, rerank=9)
