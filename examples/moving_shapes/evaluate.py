"""Score a checkpoint on held-out clips: mp4 files in, text out.

Run as `python -m examples.moving_shapes.evaluate [CHECKPOINT]` from the repository root.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import mplug2_fast as mf
from examples.moving_shapes.generator import (
    ACTIONS,
    OPPOSITE,
    QUESTION_KINDS,
    Scenes,
    answer,
    caption,
    clip_frames,
    held_out_scenes,
    questions,
    write_clip,
)
from mplug2_fast.text import Tokenizer

PACKAGED = Path(mf.__file__).parent / "data" / "tiny"
FIRST_HELD_OUT = 10_000
"""The first held-out scene that is scored. The clips in `clips/` come from earlier ones."""


def make_clips(scenes: Scenes, folder: Path) -> list[Path]:
    """Encode every scene as an mp4 file."""
    paths = [folder / f"{i:05}.mp4" for i in range(len(scenes))]
    for i, path in enumerate(paths):
        write_clip(path, clip_frames(scenes[i]))
    return paths


def load_clips(paths: list[Path], config: mf.MPlug2Config) -> Tensor:
    """The video files as `(n, 3, frames, height, width)`."""
    size = config.vision
    return torch.stack([mf.load_video(path, num_frames=size.num_frames, image_size=size.image_size) for path in paths])


def generate_captions(model: mf.MPlug2ForQuestionAnswering, tokenizer: Tokenizer, videos: Tensor) -> list[str]:
    sequences = model.captioner().generate(videos).sequences[:, 0]
    return [tokenizer.decode_caption(ids, model.config.generation.prompt) for ids in sequences]


def generate_answers(
    model: mf.MPlug2ForQuestionAnswering, tokenizer: Tokenizer, videos: Tensor, asked: list[str]
) -> list[str]:
    ids, mask = tokenizer.encode_questions(asked)
    sequences = model.generate(videos, question_ids=ids, question_mask=mask).sequences[:, 0]
    return [tokenizer.decode(ids) for ids in sequences]


def pick_question(scenes: Scenes, i: int, kind: str) -> str:
    """One way to ask the question. It differs from scene to scene."""
    ways = questions(scenes, i, kind)
    return ways[i % len(ways)]


def score(scenes: Scenes, captions: list[str], answers: dict[str, list[str]]) -> dict[str, float]:
    """Shares of captions, answers and directions that are exactly right.

    `axis` counts clips that move, grow or shrink: the share whose caption has the right action or its opposite.
    `direction` is the share of those that has the right action. Guessing gives 0.5.
    """
    n = len(scenes)
    result = {"clips": n, "captions": sum(captions[i] == caption(scenes, i) for i in range(n)) / n}
    for kind in QUESTION_KINDS:
        result[f"answers_{kind}"] = sum(answers[kind][i] == answer(scenes, i, kind) for i in range(n)) / n
    result["answers"] = sum(result[f"answers_{kind}"] for kind in QUESTION_KINDS) / len(QUESTION_KINDS)
    moving = [i for i in range(n) if OPPOSITE[scenes.action[i]] != scenes.action[i]]
    right = sum(captions[i].endswith(ACTIONS[scenes.action[i]]) for i in moving)
    opposite = sum(captions[i].endswith(ACTIONS[OPPOSITE[scenes.action[i]]]) for i in moving)
    result["axis"] = (right + opposite) / max(1, len(moving))
    result["direction"] = right / max(1, right + opposite)
    return result


def show(result: dict[str, float], console: Console) -> None:
    table = Table(title=f"{result['clips']} held-out clips")
    table.add_column("exactly right")
    table.add_column("%", justify="right")
    rows = {"captions": "captions", "answers": "answers, all kinds"}
    rows |= {f"answers_{kind}": f"  {kind}" for kind in QUESTION_KINDS}
    rows |= {"axis": "axis of motion", "direction": "direction on that axis (chance 50)"}
    for key, label in rows.items():
        table.add_row(label, f"{100 * result[key]:.1f}")
    console.print(table)


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder. Default: the packaged one.")] = PACKAGED,
    clips: Annotated[int, typer.Option(min=1, help="Number of held-out clips.")] = 500,
    first: Annotated[int, typer.Option(help="Number of the first held-out scene.")] = FIRST_HELD_OUT,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    mistakes: Annotated[bool, typer.Option(help="List the wrong captions and answers.")] = False,
) -> None:
    """Caption held-out clips and ask about their colour, shape, action and direction."""
    model = mf.from_pretrained(checkpoint, task="question_answering")
    tokenizer = Tokenizer.from_vocab(checkpoint / "vocab.txt", vocab_size=model.config.text.vocab_size)
    scenes = held_out_scenes(clips, first)
    errors = Console(stderr=True)
    captions: list[str] = []
    answers: dict[str, list[str]] = {kind: [] for kind in QUESTION_KINDS}
    with tempfile.TemporaryDirectory() as folder:
        paths = make_clips(scenes, Path(folder))
        for start in track(range(0, clips, batch_size), "clips", console=errors, disable=not errors.is_terminal):
            some = range(start, min(start + batch_size, clips))
            videos = load_clips([paths[i] for i in some], model.config)
            captions += generate_captions(model, tokenizer, videos)
            for kind in QUESTION_KINDS:
                asked = [pick_question(scenes, i, kind) for i in some]
                answers[kind] += generate_answers(model, tokenizer, videos, asked)
    result = score(scenes, captions, answers)
    if mistakes:
        for i in range(clips):
            if captions[i] != caption(scenes, i):
                errors.print(f"{first + i}: {captions[i]!r} should be {caption(scenes, i)!r}")
            for kind in QUESTION_KINDS:
                if answers[kind][i] != answer(scenes, i, kind):
                    question = pick_question(scenes, i, kind)
                    errors.print(f"{first + i}: {question}? {answers[kind][i]!r}, not {answer(scenes, i, kind)!r}")
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console())


if __name__ == "__main__":
    typer.run(main)
