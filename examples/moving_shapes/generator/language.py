"""Captions, questions, answers and phrases for scenes, logs of several captions, and the vocabulary of all texts."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Sequence

from examples.moving_shapes.generator.scenes import ACTIONS, COLORS, SHAPES, Scenes

_QUESTIONS = {
    "color": ("what color is {it}", "which color is {it}", "what is the color of {it}"),
    "shape": ("what shape is it", "which shape is it", "what shape is shown"),
    "action": ("what does {it} do", "what is {it} doing", "what happens to {it}", "what happens"),
    "direction": ("which way does {it} move", "in which direction does {it} move", "where does {it} move"),
}
QUESTION_KINDS = tuple(_QUESTIONS)
NOWHERE = "nowhere"

_PHRASES = ("the shape", "the {shape}", "the {color} shape", "the {color} {shape}")
PLACES = ("first", "second", "third")
"""Which caption of a log is asked for."""

FIRST_PLACE, VOCABULARY = 344, 682
"""The entries from 344 on are places of boxes, so words come before. Number of all entries."""

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


def phrases(scenes: Scenes, i: int) -> list[str]:
    """All ways to name the shape of scene i, such as "the red circle"."""
    return _phrases(_COLOR_NAMES[scenes.color[i]], SHAPES[scenes.shape[i]])


def log(captions: Sequence[str], place: str) -> str:
    """Three captions in a row, and a question for the one at a place of `PLACES`."""
    return f"{' then '.join(captions)} what came {place}"


def all_captions() -> list[str]:
    """The captions of all colors, shapes and actions."""
    return [_caption(color, shape, action) for color in COLORS for shape in SHAPES for action in ACTIONS]


def all_sentences() -> Iterator[str]:
    """All possible captions, questions, answers and phrases, and a log for each place."""
    yield from _words_of_clips()
    yield from _words_of_phrases_and_logs()


def vocabulary() -> list[str]:
    """A WordPiece vocabulary: BERT's special tokens at BERT's ids, words, single characters, and places of boxes."""
    words = sorted({word for sentence in _words_of_clips() for word in sentence.split()})
    characters = string.ascii_lowercase + string.digits
    pieces = [*words, *(c for c in characters if c not in words), *(f"##{c}" for c in characters)]
    # These come last, because checkpoints exist whose vocabulary does not have them.
    pieces += sorted({word for sentence in _words_of_phrases_and_logs() for word in sentence.split()} - {*words})
    unused = (f"[unused{i}]" for i in range(VOCABULARY))
    entries = [_SPECIAL.get(i) or next(unused) for i in range(104)] + pieces
    assert len(entries) <= FIRST_PLACE
    return entries + [next(unused) for _ in range(VOCABULARY - len(entries))]


def _words_of_clips() -> Iterator[str]:
    yield from all_captions()
    for kind in QUESTION_KINDS:
        for shape in SHAPES:
            yield from _questions(kind, shape)
    yield from (*COLORS, *SHAPES, *ACTIONS, *map(_direction, ACTIONS))


def _words_of_phrases_and_logs() -> Iterator[str]:
    for color, shape in itertools.product(COLORS, SHAPES):
        yield from _phrases(color, shape)
    yield from (log(all_captions()[:3], place) for place in PLACES)


def _caption(color: str, shape: str, action: str) -> str:
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape} {action}"


def _questions(kind: str, shape: str) -> list[str]:
    ways = [way.format(it=it) for way in _QUESTIONS[kind] for it in ("the shape", "it", f"the {shape}")]
    return list(dict.fromkeys(ways))


def _phrases(color: str, shape: str) -> list[str]:
    return [way.format(color=color, shape=shape) for way in _PHRASES]


def _direction(action: str) -> str:
    return action.removeprefix("moves ") if action.startswith("moves") else NOWHERE
