"""Each family's token ids of texts. Expected ids are those of the official datasets, with bert-base-uncased."""

import json
from types import SimpleNamespace

import pytest

import mplug2_fast as mf
from mplug2_fast.datasets import Item
from mplug2_fast.errors import DataError
from mplug2_fast.models.mplug.wording import video_caption
from mplug2_fast.text import Tokenizer
from tests.golden.cases import FOLDER

WORDING = mf.MPlugConfig.wording


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_vocab()


def texts_of(case):
    return json.loads((FOLDER / case / "case.json").read_text())["texts"]


def test_questions_and_answers(tokenizer):
    for entry in texts_of("mplug_vqa")["train"]:
        given = entry["annotation"]
        item = Item(id="1", question=given["question"], extra=given)
        question = WORDING.question_of(item)
        assert question == entry["question"]
        assert WORDING.questions(tokenizer, [question])[0].tolist() == [entry["question_ids"]]
        answers = [answer.removesuffix("[SEP]") for answer in entry["answers"]]
        assert WORDING.answers(tokenizer, answers)[0].tolist() == entry["answer_ids"]


def test_a_question_is_truncated_in_training_alone(tokenizer):
    long = ["word " * 100]
    assert WORDING.training_questions(tokenizer, long, 512)[0].shape[1] == 80
    assert WORDING.questions(tokenizer, long)[0].shape[1] == 101


def test_words_and_objects_do_not_count_as_a_long_question(tokenizer):
    """The fields `ocr` and `object_label` add words to a question that mPLUG reads as a whole."""
    config = mf.MPlugConfig.preset("tiny").replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=128)
    task, model = mf.tasks.get("question_answering"), SimpleNamespace(config=config)
    extra = {"ocr": [[place, "word"] for place in range(40)], "object_label": "&&".join(["man"] * 30)}
    task.check_text(model, tokenizer, task.text_of(Item("1", question="what?", extra=extra), config))
    with pytest.raises(DataError, match=r"^the item 1: ocr must be a list of \[place, word\], got \['ab'\]$"):
        task.text_of(Item("1", question="what?", extra={"ocr": ["ab"]}), config)


def test_a_text_keeps_what_follows_a_separator(tokenizer):
    decode = texts_of("mplug_vqa")["decode"]
    assert WORDING.caption(tokenizer, decode["ids"], "") == decode["text"]
    assert WORDING.caption(tokenizer, [*decode["ids"], *decode["ids"][1:]], "") == f"{decode['text']} {decode['text']}"


def test_captions(tokenizer):
    for entry in texts_of("mplug_caption"):
        assert WORDING.captions(tokenizer, [entry["raw"]], "", 512)[0].tolist() == [entry["ids"]]


def test_descriptions(tokenizer):
    for entry in texts_of("mplug_retrieval"):
        raw = [entry["raw"]]
        training, _ = WORDING.descriptions(tokenizer, raw, video=False, training=True)
        assert training.tolist() == [entry["train_ids"]]
        for name, video in (("test_ids", False), ("video_ids", True)):
            ids, mask = WORDING.descriptions(tokenizer, raw, video=video, training=False)
            wanted = [token for token in entry[name] if token]
            assert ids.tolist() == [wanted]
            assert mask.sum() == len(wanted)


def test_phrases(tokenizer):
    for entry in texts_of("mplug_grounding"):
        ids, mask = WORDING.phrases(tokenizer, [entry["raw"]])
        assert (ids.tolist(), mask.tolist()) == ([entry["ids"]], [entry["mask"]])


def test_a_prompt_loses_its_last_token(tokenizer):
    assert WORDING.prefix(tokenizer, "a picture of") == (101, 1037, 3861)
    assert WORDING.prefix(tokenizer, "") == (101,)
    assert mf.MPlug2Config.wording.prefix(tokenizer, "a video of") == (101,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a picture of a man", "a man ."),
        ("a picture of a video of a dog", "a dog ."),
        ("a video showing a video of a cat", "a cat ."),
        ("a tree", "a tree ."),
    ],
)
def test_opening_words_of_video_captions(text, expected):
    assert video_caption(text) == expected
