"""Referring phrases, questions and answers for scenes, and the vocabulary of all texts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from examples.shapes.scenes import COLORS, COUNTS, RELATIONS, SHAPES, SIZES, Object, Scene

ANSWERS = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "count": ("zero", "one", "two"),
    "objects": ("two", "three", "four"),
    "exists": ("yes", "no"),
    "relation": ("yes", "no"),
}
"""Kind of question -> its answers. All are equally frequent."""
QUESTION_KINDS = tuple(ANSWERS)

_NUMBERS = ("zero", "one", "two", "three", "four")
_SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
_FIRST_WORD = 700
"""Entries before it have BERT's names. Boxes are the entries 344 to 681."""


def phrase(scene: Scene, target: Object, rng: np.random.Generator) -> str:
    """A text that only the target fits, such as "the red ring" or "the ring left of the blue square".

    Half of the time it needs the relation, if there is such a phrase.
    """
    plain = [f"the {name}" for name in _names(target) if _only(scene, target, name)]
    if rng.random() < 0.5:
        related = [
            f"the {name} {place}"
            for name in (*_names(target), target.shape)
            if not _only(scene, target, name)
            for place in _places(scene, target, name)
        ]
        plain = related or plain
    return str(rng.choice(plain))


def question(scene: Scene, kind: str, answer: str, rng: np.random.Generator) -> str | None:
    """A question of a kind that has this answer, or None if the scene allows none."""
    found = list(_QUESTIONS[kind](scene, answer))
    return str(rng.choice(found)) if found else None


def absent(scene: Scene, rng: np.random.Generator) -> str:
    """A question for an object whose color or shape is nowhere in the scene. Every scene lacks some color."""
    colors, shapes = {each.color for each in scene}, {each.shape for each in scene}
    pairs = [*itertools.product(COLORS.keys() - colors, shapes), *itertools.product(colors, {*SHAPES} - shapes)]
    color, shape = rng.choice(sorted(pairs))
    return f"is there a {color} {shape}"


def matches(scene: Scene, text: str) -> list[Object]:
    """The objects that a phrase fits."""
    name, relation, other = text, None, ""
    for each in RELATIONS:
        if f" {each} " in text:
            name, _, other = text.partition(f" {each} ")
            relation = each
    found = [each for each in scene if _fits(each, name.removeprefix("the "))]
    if relation is None:
        return found
    (anchor,) = (each for each in scene if _fits(each, other.removeprefix("the ")))
    return [each for each in found if each != anchor and each.stands(relation, anchor)]


def vocabulary() -> list[str]:
    """A WordPiece vocabulary: BERT's special tokens and unused entries at BERT's ids, then the words."""
    unused = (f"[unused{i}]" for i in itertools.count())
    entries = [_SPECIAL.get(i) or next(unused) for i in range(_FIRST_WORD)]
    names = (*SIZES, *COLORS, *SHAPES, *_NUMBERS, *(word for relation in RELATIONS for word in relation.split()))
    texts = "a the is there what color shape object objects how many are yes no"
    return [*entries, *sorted({*names, *map(_plural, SHAPES), *texts.split(" ")})]


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _names(each: Object) -> list[str]:
    """Ways to name an object without its place."""
    short = [f"{each.color} {each.shape}", f"{each.size} {each.shape}"]
    return [*short, f"{each.size} {each.color} {each.shape}"]


def _fits(each: Object, name: str) -> bool:
    return {*name.split()} <= {each.size, each.color, each.shape, "object"}


def _only(scene: Scene, target: Object, name: str) -> bool:
    return [each for each in scene if _fits(each, name)] == [target]


def _places(scene: Scene, target: Object, name: str, *, unlike: str = "") -> Iterator[str]:
    """The relations to other objects that only the target has, among the objects of a name.

    Args:
        unlike: a field of objects. The other object must differ from the target in it.
    """
    rivals = [each for each in scene if _fits(each, name)]
    for other in scene:
        if other == target or (unlike and getattr(other, unlike) == getattr(target, unlike)):
            continue
        known = [text for text in _names(other) if _only(scene, other, text)]
        for relation in RELATIONS:
            if [each for each in rivals if each != other and each.stands(relation, other)] == [target]:
                yield from (f"{relation} the {text}" for text in known)


def _color(scene: Scene, answer: str) -> Iterator[str]:
    for each in scene:
        if each.color == answer:
            yield from (
                f"what color is the {each.shape} {place}" for place in _places(scene, each, each.shape, unlike="shape")
            )


def _shape(scene: Scene, answer: str) -> Iterator[str]:
    for each in scene:
        if each.shape == answer:
            name = f"{each.color} object"
            yield from (f"what shape is the {name} {place}" for place in _places(scene, each, name, unlike="color"))


def _count(scene: Scene, answer: str) -> Iterator[str]:
    wanted = _NUMBERS.index(answer)
    for color in COLORS:
        if sum(each.color == color for each in scene) == wanted:
            yield f"how many {color} objects are there"
    for shape in SHAPES:
        if sum(each.shape == shape for each in scene) == wanted:
            yield f"how many {_plural(shape)} are there"


def _objects(scene: Scene, answer: str) -> Iterator[str]:
    if _NUMBERS[len(scene)] == answer:
        yield "how many objects are there"


def _exists(scene: Scene, answer: str) -> Iterator[str]:
    """The "no" asks for a color and a shape that are there, but not together."""
    there = {(each.color, each.shape) for each in scene}
    pairs = set(itertools.product({color for color, _ in there}, {shape for _, shape in there}))
    for color, shape in sorted(there if answer == "yes" else pairs - there):
        yield f"is there a {color} {shape}"


def _relation(scene: Scene, answer: str) -> Iterator[str]:
    for this, other in itertools.permutations(scene, 2):
        for relation in RELATIONS:
            if this.stands(relation, other) == (answer == "yes"):
                for one, two in itertools.product(_names(this), _names(other)):
                    if _only(scene, this, one) and _only(scene, other, two):
                        yield f"is the {one} {relation} the {two}"


_QUESTIONS = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "objects": _objects,
    "exists": _exists,
    "relation": _relation,
}
assert {_NUMBERS[count] for count in COUNTS} == set(ANSWERS["objects"])
