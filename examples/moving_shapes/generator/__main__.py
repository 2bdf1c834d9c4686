"""Write held-out clips as mp4 files, and their captions and answers to clips.json.

Run as `python -m examples.moving_shapes.generator FOLDER --scene 22 --scene 30` from the repository root.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from examples.moving_shapes.generator import (
    QUESTION_KINDS,
    answer,
    caption,
    clip_frames,
    held_out_scenes,
    questions,
    write_clip,
)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")],
    scene: Annotated[list[int], typer.Option(help="Number of a held-out scene. May be repeated.")],
) -> None:
    """Write held-out clips and clips.json into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {}
    for number in scene:
        scenes = held_out_scenes(1, number)
        name = "_".join(caption(scenes, 0).split()[1:]) + ".mp4"
        write_clip(folder / name, clip_frames(scenes))
        described[name] = {
            "scene": number,
            "caption": caption(scenes, 0),
            "questions": {questions(scenes, 0, kind)[0]: answer(scenes, 0, kind) for kind in QUESTION_KINDS},
        }
    (folder / "clips.json").write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
