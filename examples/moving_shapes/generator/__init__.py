"""Short clips of one coloured shape that moves, grows, shrinks or stays still, with captions and questions."""

from examples.moving_shapes.generator.clips import clip_frames, write_clip
from examples.moving_shapes.generator.language import (
    PLACES,
    QUESTION_KINDS,
    all_captions,
    all_sentences,
    answer,
    caption,
    log,
    phrases,
    questions,
    vocabulary,
)
from examples.moving_shapes.generator.render import SEEN_FRAMES, boxes, render, training_frames, training_picture
from examples.moving_shapes.generator.scenes import (
    ACTIONS,
    COLORS,
    OPPOSITE,
    SHAPES,
    Scenes,
    held_out_scenes,
    sample_scenes,
    training_rng,
)

__all__ = [
    "ACTIONS",
    "COLORS",
    "OPPOSITE",
    "PLACES",
    "QUESTION_KINDS",
    "SEEN_FRAMES",
    "SHAPES",
    "Scenes",
    "all_captions",
    "all_sentences",
    "answer",
    "boxes",
    "caption",
    "clip_frames",
    "held_out_scenes",
    "log",
    "phrases",
    "questions",
    "render",
    "sample_scenes",
    "training_frames",
    "training_picture",
    "training_rng",
    "vocabulary",
    "write_clip",
]
