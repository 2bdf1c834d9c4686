"""Write held-out pictures as PNG files, and their texts to test.jsonl.

Run as `python -m examples.shapes.write FOLDER` from the repository root.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from examples.shapes.data import example
from examples.shapes.render import draw
from mplug2_fast.datasets import Item, write_items

FIRST = 100_000
"""Number of the first held-out picture that is scored. Earlier ones are for tests and demonstrations."""


def held_out(number: int, image: str | None = None) -> tuple[np.ndarray, Item]:
    """A held-out picture and its item."""
    rng = np.random.default_rng([1, number])
    scene, item = example(rng, held_out=True, id=str(number), image=image)
    return draw(scene, rng), item


def write(folder: Path, count: int, first: int = FIRST) -> list[Item]:
    """Write pictures with different captions. Paths of the returned items are relative to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    items: dict[str, Item] = {}
    number = first
    while len(items) < count:
        picture, item = held_out(number, f"{number}.png")
        if item.caption[0] not in items:
            Image.fromarray(picture).save(folder / f"{number}.png")
            items[item.caption[0]] = item
        number += 1
    write_items(folder / "test.jsonl", items.values())
    return list(items.values())


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")],
    count: Annotated[int, typer.Option(min=1, help="Number of pictures.")] = 500,
    first: Annotated[int, typer.Option(help="Number of the first held-out picture.")] = FIRST,
) -> None:
    """Write held-out pictures and test.jsonl into a folder."""
    items = write(folder, count, first)
    typer.echo(f"{folder}: {len(items)} pictures")


if __name__ == "__main__":
    typer.run(main)
