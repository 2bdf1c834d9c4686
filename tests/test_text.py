"""The tokenizer against ids that were derived by hand, and the clean-up against its description."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2_fast.errors import ConfigError
from mplug2_fast.text import PACKAGED_VOCABULARY, Tokenizer, clean_caption, clean_question

CLS, SEP, UNK, PAD = 101, 102, 100, 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_vocab()


def by_hand(*tokens: str) -> list[int]:
    """Ids of whole WordPiece tokens: their line numbers in the vocabulary, from 0."""
    lines = PACKAGED_VOCABULARY.read_text(encoding="utf-8").split("\n")
    return [lines.index(token) for token in tokens]


def ids_of(tokenizer: Tokenizer, text: str, **kwargs) -> list[int]:
    return tokenizer.encode([text], **{"end": False, **kwargs})[0][0].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello world", [CLS, 7592, 2088]),
        ("Hello, WORLD!", [CLS, 7592, 1010, 2088, 999]),
        ("a man is playing a guitar", [CLS, 1037, 2158, 2003, 2652, 1037, 2858]),
        ("what color is the cafe?", [CLS, 2054, 3609, 2003, 1996, 7668, 1029]),
        ("  hello\t world\n", [CLS, 7592, 2088]),
        ("", [CLS]),
        ("   ", [CLS]),
        ("Café naïve", [CLS, 7668, 15743]),
        ("Cafe\u0301", [CLS, 7668]),
        ("\U0001f600", [CLS, UNK]),
        ("hello\u200bworld\x00", None),
        ("a" * 101, [CLS, UNK]),
    ],
)
def test_known_ids(tokenizer: Tokenizer, text: str, expected: list[int] | None) -> None:
    if expected is None:  # zero-width space and NUL are dropped, which joins the words
        expected = [CLS, *by_hand("hello", "##world")]
    assert ids_of(tokenizer, text) == expected


def test_long_words_are_split_greedily(tokenizer: Tokenizer) -> None:
    assert ids_of(tokenizer, "unaffable") == [CLS, *by_hand("una", "##ffa", "##ble")]
    assert ids_of(tokenizer, "skateboarding turtlenecks") == [CLS, 17260, 21172, 13170, 18278, 2015]


def test_every_ideograph_is_a_word(tokenizer: Tokenizer) -> None:
    assert ids_of(tokenizer, "中文") == [CLS, *by_hand("中", "文")]


def test_special_tokens_in_a_text_are_one_token(tokenizer: Tokenizer) -> None:
    assert ids_of(tokenizer, "hello[SEP]") == [CLS, 7592, SEP]
    assert ids_of(tokenizer, "[MASK] [UNK] [PAD] [CLS]") == [CLS, 103, UNK, PAD, CLS]
    assert SEP not in ids_of(tokenizer, "[sep]")


def test_batch_is_padded_and_masked(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.encode(["hello world", "", "hello"], end=True)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [[CLS, 7592, 2088, SEP], [CLS, SEP, PAD, PAD], [CLS, 7592, SEP, PAD]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]


def test_a_literal_pad_token_is_no_padding(tokenizer: Tokenizer) -> None:
    _, mask = tokenizer.encode(["hello [PAD]"], end=False)
    assert mask.tolist() == [[1, 1, 1]]


def test_no_texts(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.encode([], end=True)
    assert ids.shape == mask.shape == (0, 0)


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (None, [CLS, 7592, 2088, SEP]),
        (4, [CLS, 7592, 2088, SEP]),
        (3, [CLS, 7592, 2088]),
        (2, [CLS, 7592]),
        (1, [CLS]),
    ],
)
def test_truncation_drops_the_end_and_keeps_cls(
    tokenizer: Tokenizer, max_length: int | None, expected: list[int]
) -> None:
    assert ids_of(tokenizer, "hello world", end=True, max_length=max_length) == expected


def test_max_length_must_leave_room(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="room for"):
        tokenizer.encode(["hello"], 0, end=True)


def test_questions_answers_and_captions_follow_the_released_conventions(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_questions(["What's the color?"])[0].tolist() == [
        [CLS, *by_hand("what", "##s", "the", "color")]
    ]
    assert tokenizer.encode_answers(["guitar", "a man"])[0].tolist() == [[CLS, 2858, SEP, PAD], [CLS, 1037, 2158, SEP]]
    assert tokenizer.encode_captions(["A man."])[0].tolist() == [[CLS, 1037, 2158, SEP]]
    with_prompt = tokenizer.encode_captions(["A man."], prompt="a video of ", max_length=6)[0].tolist()
    assert with_prompt == [[CLS, *by_hand("a", "video", "of", "a", "man")]]


def test_decode_drops_padding_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([CLS, 7592, SEP, 2088, SEP, PAD, -1, -1]) == "hello world"
    assert tokenizer.decode(torch.tensor([CLS, *by_hand("una", "##ffa", "##ble"), SEP])) == "unaffable"
    assert tokenizer.decode([CLS, UNK, 7592]) == "[UNK] hello"
    assert tokenizer.decode([CLS, SEP, -1]) == ""
    assert tokenizer.decode([]) == ""


def test_a_caption_is_what_follows_the_last_prompt(tokenizer: Tokenizer) -> None:
    ids = [CLS, *by_hand("a", "video", "of", "a", "video", "of", "a", "man"), SEP]
    assert tokenizer.decode_caption(ids) == "a video of a video of a man"
    assert tokenizer.decode_caption(ids, prompt="a video of") == "a man"
    assert tokenizer.decode_caption(ids, prompt="a picture of") == "a video of a video of a man"


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "man", "is", "playing", "guitar", "color"]), max_size=12))
def test_known_words_survive_the_round_trip(words: list[str]) -> None:
    tokenizer = _shared()
    ids, mask = tokenizer.encode([" ".join(words)], end=True)
    assert mask.sum() == len(words) + 2
    assert tokenizer.decode(ids[0]) == " ".join(words)


@settings(deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.integers(1, 8))
def test_any_text_has_the_promised_form(texts: list[str], max_length: int) -> None:
    ids, mask = _shared().encode(texts, max_length, end=True)
    assert ids.shape == mask.shape
    assert 1 <= ids.shape[1] <= max_length
    assert (ids[:, 0] == CLS).all()
    assert (ids[mask == 0] == PAD).all()
    assert (mask.diff(dim=1) <= 0).all()
    assert ((ids >= 0) & (ids < 30522)).all()


_tokenizers: list[Tokenizer] = []


def _shared() -> Tokenizer:
    """One tokenizer for all examples of a property: hypothesis and pytest fixtures of a function do not mix."""
    if not _tokenizers:
        _tokenizers.append(Tokenizer.from_vocab())
    return _tokenizers[0]


# --- vocabularies -----------------------------------------------------------------------------------------------------


def small_vocabulary() -> list[str]:
    tokens = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*tokens, "red", "square", "##s"]


def write(path: Path, tokens: list[str]) -> Path:
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


def test_a_vocabulary_of_its_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_vocab(write(tmp_path / "vocab.txt", small_vocabulary()), vocab_size=107)
    assert tokenizer.vocab_size == 107
    assert ids_of(tokenizer, "Red squares, hello", end=True) == [CLS, 104, 105, 106, UNK, UNK, SEP]
    assert tokenizer.decode([CLS, 104, 105, 106, SEP]) == "red squares"


def test_windows_line_ends_are_no_part_of_the_tokens(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join(small_vocabulary()).encode())
    assert ids_of(Tokenizer.from_vocab(path), "red") == [CLS, 104]


def test_a_vocabulary_of_another_size_names_both_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "vocab.txt", small_vocabulary())
    with pytest.raises(ConfigError, match=r"vocab\.txt: the vocabulary has 107 tokens and the model has 30522"):
        Tokenizer.from_vocab(path, vocab_size=30522)
    with pytest.raises(ConfigError, match="30522 tokens and the model has 256"):
        Tokenizer.from_vocab(vocab_size=256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: [*v, "red"], "'red' twice"),
        (lambda v: v[1:], r"\[PAD\] is missing"),
        (lambda v: ["first", *v], r"\[PAD\] has id 1"),
        (lambda v: [t for t in v if t != "[MASK]"], r"\[MASK\] is missing"),
    ],
)
def test_a_file_that_is_no_bert_vocabulary(tmp_path: Path, change, message: str) -> None:
    path = write(tmp_path / "vocab.txt", change(small_vocabulary()))
    with pytest.raises(ConfigError, match=message) as error:
        Tokenizer.from_vocab(path)
    assert str(path) in str(error.value)


def test_a_vocabulary_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Tokenizer.from_vocab(tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        Tokenizer.from_vocab(tmp_path / "binary.txt")


# --- clean-up ---------------------------------------------------------------------------------------------------------

REMOVED = ",.'!?\"()*#:;~"


@pytest.mark.parametrize(
    ("text", "question", "caption"),
    [
        ("What is the Man doing?", "what is the man doing", "what is the man doing"),
        ("black-and-white / color", "black and white   color", "black and white color"),
        ("It's (really) a *test*: #1; ~yes!", "its really a test 1 yes", "its really a test 1 yes"),
        ("  two  spaces  ", "  two  spaces", "two spaces"),
        ("<PERSON> waves\n", "<person> waves\n", "person waves"),
        ("tab\there", "tab\there", "tab\there"),
        ("tabs\t\there", "tabs\t\there", "tabs here"),
        ("", "", ""),
    ],
)
def test_clean_up_by_example(text: str, question: str, caption: str) -> None:
    assert clean_question(text) == question
    assert clean_caption(text) == caption


def test_clean_up_keeps_the_first_words() -> None:
    words = [f"w{i}" for i in range(100)]
    assert clean_question(" ".join(words)) == " ".join(words[:50])
    assert clean_caption(" ".join(words)) == " ".join(words[:80])
    assert clean_question("a b c", max_words=2) == "a b"
    assert clean_caption("a b c", max_words=2) == "a b"
    assert clean_question("a  b c", max_words=2) == "a "  # the doubled space counts as an empty word


def described(text: str) -> str:
    """Both clean-ups, character by character."""
    out = []
    for character in text.lower():
        if character in "-/":
            out.append(" ")
        elif character not in REMOVED:
            out.append(character)
    return "".join(out)


awkward = st.text(st.sampled_from(REMOVED + "-/<>pPersonAÉß İ \n\t"), max_size=60) | st.text(max_size=60)


@settings(deadline=None)
@given(awkward, st.integers(1, 12))
def test_question_clean_up_as_described(text: str, max_words: int) -> None:
    expected = described(text)
    while expected.endswith(" "):
        expected = expected[:-1]
    assert clean_question(text, 10**6) == expected
    cut = clean_question(text, max_words)
    assert expected.startswith(cut)
    assert cut.count(" ") == min(max_words - 1, expected.count(" "))


@settings(deadline=None)
@given(awkward, st.integers(1, 12))
def test_caption_clean_up_as_described(text: str, max_words: int) -> None:
    out: list[str] = []
    run = ""
    for character in described(text).replace("<person>", "person") + "$":
        if character.isspace():
            run += character
            continue
        out += " " if len(run) > 1 else run
        out, run = [*out, character], ""
    expected = "".join(out)[:-1]
    while expected.endswith("\n"):
        expected = expected[:-1]
    expected = expected.strip(" ")
    assert clean_caption(text, 10**6) == expected
    cut = clean_caption(text, max_words)
    assert expected.startswith(cut)
    assert cut.count(" ") == min(max_words - 1, expected.count(" "))
    assert not set(cut) & set(REMOVED + "-/")
