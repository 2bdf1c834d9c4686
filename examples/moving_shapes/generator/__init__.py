"""Short clips of one coloured shape that moves, grows, shrinks or stays still, with captions and questions."""

from examples.moving_shapes.generator.clips import clip_frames, write_clip
from examples.moving_shapes.generator.language import (
    QUESTION_KINDS,
    all_sentences,
    answer,
    caption,
    questions,
    vocabulary,
)
from examples.moving_shapes.generator.render import render, training_frames
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
    "QUESTION_KINDS",
    "SHAPES",
    "Scenes",
    "all_sentences",
    "answer",
    "caption",
    "clip_frames",
    "held_out_scenes",
    "questions",
    "render",
    "sample_scenes",
    "training_frames",
    "training_rng",
    "vocabulary",
    "write_clip",
]
