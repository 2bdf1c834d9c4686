"""Captions, questions and answers for scenes, and their vocabulary."""

from __future__ import annotations

import string
from collections.abc import Iterator

from examples.moving_shapes.generator.scenes import ACTIONS, COLORS, SHAPES, Scenes

_QUESTIONS = {
    "color": ("what color is {it}", "which color is {it}", "what is the color of {it}"),
    "shape": ("what shape is it", "which shape is it", "what shape is shown"),
    "action": ("what does {it} do", "what is {it} doing", "what happens to {it}", "what happens"),
    "direction": ("which way does {it} move", "in which direction does {it} move", "where does {it} move"),
}
QUESTION_KINDS = tuple(_QUESTIONS)
NOWHERE = "nowhere"

_COLOR_NAMES = tuple(COLORS)
_SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}


def caption(scenes: Scenes, i: int) -> str:
    """The caption of scene i, such as "a red circle moves left"."""
    color = _COLOR_NAMES[scenes.color[i]]
    return _caption(color, SHAPES[scenes.shape[i]], ACTIONS[scenes.action[i]])


def questions(scenes: Scenes, i: int, kind: str) -> list[str]:
    """All ways to ask for the colour, shape, action or direction of scene i. The first is the simplest."""
    return _questions(kind, SHAPES[scenes.shape[i]])


def answer(scenes: Scenes, i: int, kind: str) -> str:
    """The answer to a question of a kind: "red", "circle", "moves left", "left"."""
    if kind == "color":
        return _COLOR_NAMES[scenes.color[i]]
    if kind == "shape":
        return SHAPES[scenes.shape[i]]
    action = ACTIONS[scenes.action[i]]
    return action if kind == "action" else _direction(action)


def all_sentences() -> Iterator[str]:
    """All possible captions, questions and answers."""
    for color in COLORS:
        for shape in SHAPES:
            for action in ACTIONS:
                yield _caption(color, shape, action)
    for kind in QUESTION_KINDS:
        for shape in SHAPES:
            yield from _questions(kind, shape)
    yield from (*COLORS, *SHAPES, *ACTIONS, *map(_direction, ACTIONS))


def vocabulary(size: int = 256) -> list[str]:
    """A WordPiece vocabulary: BERT's special tokens at BERT's ids, the words, and single characters.

    Raises:
        ValueError: the entries do not fit into `size`.
    """
    words = sorted({word for sentence in all_sentences() for word in sentence.split()})
    characters = string.ascii_lowercase + string.digits
    pieces = [*words, *(c for c in characters if c not in words), *(f"##{c}" for c in characters)]
    unused = (f"[unused{i}]" for i in range(size))
    entries = [_SPECIAL.get(i) or next(unused) for i in range(104)] + pieces
    if len(entries) > size:
        raise ValueError(f"a vocabulary of {size} entries is too small: {len(entries)} are needed")
    return entries + [next(unused) for _ in range(size - len(entries))]


def _caption(color: str, shape: str, action: str) -> str:
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape} {action}"


def _questions(kind: str, shape: str) -> list[str]:
    ways = [way.format(it=it) for way in _QUESTIONS[kind] for it in ("the shape", "it", f"the {shape}")]
    return list(dict.fromkeys(ways))


def _direction(action: str) -> str:
    return action.removeprefix("moves ") if action.startswith("moves") else NOWHERE
