"""Texts to token ids and back: BERT's uncased WordPiece, and the clean-up of the official datasets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer as WordPieceTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mplug2_fast.errors import ConfigError

PACKAGED_VOCABULARY = Path(__file__).parent / "data" / "bert-base-uncased-vocab.txt"

PAD_TOKEN_ID, CLS_TOKEN_ID, SEP_TOKEN_ID = 0, 101, 102
"""As in the vocabulary of bert-base-uncased."""
_SPECIAL_IDS = {"[PAD]": PAD_TOKEN_ID, "[CLS]": CLS_TOKEN_ID, "[SEP]": SEP_TOKEN_ID}
_OTHER_SPECIALS = ("[UNK]", "[MASK]")
_JOINED = [(f" {mark}", mark) for mark in ".?!,"]
_JOINED += [(" ' ", "'"), *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re"))]
"""Replacements in decoded texts, in this order."""
_REMOVED = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")


class Tokenizer:
    """BERT's uncased WordPiece with mPLUG-2's conventions: [CLS] in front, [SEP] only with `end`."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        """Builds the tokenizer from the tokens in the order of their ids.

        Raises:
            ConfigError: a token occurs twice, or a special token is missing or has another id than the model expects.
        """
        ids = {token: i for i, token in enumerate(vocabulary)}
        if len(ids) != len(vocabulary):
            twice = next(token for i, token in enumerate(vocabulary) if ids[token] != i)
            raise ConfigError(f"the vocabulary has the token {twice!r} twice: each token must occur once")
        for token, wanted in _SPECIAL_IDS.items():
            if ids.get(token) != wanted:
                where = f"has id {ids[token]}" if token in ids else "is missing"
                raise ConfigError(f"the vocabulary is not BERT's: {token} {where}, and the model needs the id {wanted}")
        for token in _OTHER_SPECIALS:
            if token not in ids:
                raise ConfigError(f"the vocabulary is not BERT's: {token} is missing")
        self.vocab_size = len(ids)
        """Number of tokens, which is the model's `config.text.vocab_size`."""
        self._tokenizer = WordPieceTokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A", special_tokens=[("[CLS]", CLS_TOKEN_ID)]
        )
        self._tokenizer.decoder = decoders.WordPiece()
        self._tokenizer.add_special_tokens([*_SPECIAL_IDS, *_OTHER_SPECIALS])

    @classmethod
    def from_vocab(cls, path: str | Path | None = None, *, vocab_size: int | None = None) -> Tokenizer:
        """Reads a vocabulary file with one token per line; None reads that of bert-base-uncased, which is included.

        Args:
            path: the file.
            vocab_size: what the model expects, `config.text.vocab_size`. None: not checked.

        Raises:
            ConfigError: the file cannot be read, is not a BERT vocabulary, or has another number of tokens.
        """
        path = PACKAGED_VOCABULARY if path is None else Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(f"{path}: the vocabulary cannot be read: {reason}") from error
        try:
            tokenizer = cls(text.removesuffix("\n").split("\n"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        if vocab_size is not None and vocab_size != tokenizer.vocab_size:
            raise ConfigError(
                f"{path}: the vocabulary has {tokenizer.vocab_size} tokens and the model has {vocab_size}: "
                "put the vocab.txt that the model was trained with into its directory"
            )
        return tokenizer

    def vocabulary(self) -> list[str]:
        """The tokens in the order of their ids."""
        return sorted(ids := self._tokenizer.get_vocab(), key=ids.__getitem__)

    def encode(self, texts: Sequence[str], max_length: int | None = None, *, end: bool) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both (len(texts), longest) int64, on the CPU.

        Each row is [CLS], the text's tokens and, with `end`, [SEP]. Shorter rows are padded with 0, where the mask is 0
        too. A row is cut to `max_length` tokens, [CLS] included. A cut row has no [SEP], because the official code
        appends [SEP] before it truncates. The name of a special token in a text, such as "[SEP]", becomes that token.
        """
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length must leave room for [CLS], got {max_length}")
        if not texts:
            return torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.int64)
        encodings = self._tokenizer.encode_batch([f"{text}[SEP]" if end else text for text in texts])
        rows = [torch.tensor(encoding.ids[:max_length]) for encoding in encodings]
        ids = pad_sequence(rows, batch_first=True, padding_value=PAD_TOKEN_ID)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return ids, mask

    def encode_questions(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and masks of questions as in the official test code: cleaned, not truncated, without [SEP]."""
        return self.encode([clean_question(question) for question in questions], end=False)

    def encode_answers(self, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and masks of answers as in the official code: unchanged, with [SEP]."""
        return self.encode(answers, end=True)

    def encode_captions(
        self, captions: Sequence[str], prompt: str = "", max_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ids and masks of captions for training: cleaned, with `prompt` in front and [SEP] at the end."""
        return self.encode([prompt + clean_caption(caption) for caption in captions], max_length, end=True)

    def encode_phrases(self, phrases: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids and masks `(texts, length)` of phrases: [CLS], at most `length - 2` tokens, [SEP], padding."""
        ids = torch.zeros(len(phrases), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, encoding in enumerate(self._tokenizer.encode_batch(list(phrases))):
            tokens = [*encoding.ids[: length - 1], SEP_TOKEN_ID]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask

    def unknown_words(self, text: str) -> list[str]:
        """The words of `text` that become [UNK], in the order of their first occurrence."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        unknown = (
            start_end for token, start_end in zip(encoding.tokens, encoding.offsets, strict=True) if token == "[UNK]"
        )
        return list(dict.fromkeys(text[start:end] for start, end in unknown))

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of one sequence of ids.

        Padding (-1 or 0), [CLS] and [SEP] are dropped everywhere. As in the official code, [SEP] does not end the text.
        Spaces before punctuation and in contractions are removed, as BERT's tokenizer does.
        """
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        kept = [i for i in ids if i >= 0 and i not in _SPECIAL_IDS.values()]
        text = self._tokenizer.decode(kept, skip_special_tokens=False)
        for apart, joined in _JOINED:
            text = text.replace(apart, joined)
        return text.strip()

    def decode_caption(self, ids: Iterable[int] | Tensor, prompt: str = "") -> str:
        """The part of `decode`'s text after the last occurrence of `prompt`."""
        text = self.decode(ids)
        return text.rpartition(prompt)[2].strip() if prompt else text


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8. Bytes that were not UTF-8 and lone surrogates from JSON cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def clean_question(text: str, max_words: int = 50) -> str:
    """A question as the official datasets clean it: lower case, without punctuation, at most `max_words` words.

    Single spaces separate words, so two spaces in a row count as an empty word, as in the official code.
    """
    return _first_words(text.lower().translate(_REMOVED).rstrip(" "), max_words)


def clean_caption(text: str, max_words: int = 80) -> str:
    """A caption as the official datasets clean it: like a question, and each run of white space becomes one space."""
    text = text.lower().translate(_REMOVED).replace("<person>", "person")
    return _first_words(re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" "), max_words)


def _first_words(text: str, max_words: int) -> str:
    return " ".join(text.split(" ")[:max_words])
