"""A tiny mPLUG-2 that captions short clips of moving shapes: generator, training recipe, evaluation."""
