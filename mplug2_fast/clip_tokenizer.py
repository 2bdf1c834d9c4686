"""Texts to the token ids of CLIP's text tower: byte-pair encoding with CLIP's published merges."""

from __future__ import annotations

import functools
import gzip
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

MERGES = Path(__file__).parent / "data" / "clip-bpe-vocab.txt.gz"
END_OF_MERGES = 48895
"""Line after the merges that CLIP uses. The first line is the version of the file."""

START, END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """CLIP's tokenizer, without the official one's first step, the repair of wrongly decoded characters."""

    def __init__(self) -> None:
        with gzip.open(MERGES, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1:END_OF_MERGES]
        merges = [(first, second) for first, second in (line.split() for line in lines)]
        letters = _byte_letters()
        tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges), START, END]
        ids = {token: number for number, token in enumerate(tokens)}
        self.vocab_size, self.start, self.end = len(ids), ids[START], ids[END]
        self._tokenizer = Tokenizer(models.BPE(ids, merges, end_of_word_suffix="</w>", unk_token=END))
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """Ids `(texts, longest)`, int64, at most `length` per text: start token, text, end token, zeros."""
        rows = [encoding.ids[: length - 2] for encoding in self._tokenizer.encode_batch(list(texts))]
        ids = torch.zeros(len(rows), 2 + max(map(len, rows), default=0), dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row) + 2] = torch.tensor([self.start, *row, self.end])
        return ids


@functools.cache
def clip_tokenizer() -> ClipTokenizer:
    """The tokenizer, made once."""
    return ClipTokenizer()


def _byte_letters() -> list[str]:
    """The printable letters that stand for the bytes, in CLIP's order: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
