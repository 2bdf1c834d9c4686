"""Score a checkpoint on held-out clips: mp4 files in, texts, boxes and rankings out.

Run as `python -m examples.moving_shapes.evaluate [CHECKPOINT]` from the repository root.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor

import mplug2_fast as mf
from examples.moving_shapes.data import Logs
from examples.moving_shapes.generator import (
    ACTIONS,
    OPPOSITE,
    QUESTION_KINDS,
    SEEN_FRAMES,
    Scenes,
    all_captions,
    answer,
    boxes,
    caption,
    clip_frames,
    held_out_scenes,
    phrases,
    questions,
    write_clip,
)
from examples.moving_shapes.report import show
from mplug2_fast.checkpoint import from_pretrained
from mplug2_fast.evaluation.recall import recalls
from mplug2_fast.tasks import Alternative, Classification
from mplug2_fast.tasks.grounding import corners, iou
from mplug2_fast.text import Tokenizer

PACKAGED = Path(mf.__file__).parent / "data" / "tiny"
FIRST_HELD_OUT = 10_000
"""The first held-out scene that is scored. The clips in `clips/` come from earlier ones."""
FIRST_OF_GALLERY = 30_000
"""The first held-out scene that may be in a gallery of retrieval."""
GALLERY_SCENES = 10_000
"""Between the first ones of two galleries."""
RERANKED = 16
"""Candidates of each query that the matching head scores."""
BATCH = 50


def load(checkpoint: Path, dtype: str = "auto", keep: Sequence[str] = ()) -> tuple[Any, Tokenizer]:
    """The model for the tasks that the checkpoint names, and for captions and questions, and its tokenizer."""
    model = from_pretrained(checkpoint, dtype=dtype, keep=keep)
    for task in ("captioning", "question_answering"):
        if task not in model.tasks:
            model.add_task(task)
    return model, Tokenizer.from_vocab(checkpoint / "vocab.txt", vocab_size=model.config.text.vocab_size)


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


def encoded(model: Any, scenes: Scenes) -> Tensor:
    """The image_embeds `(n, S, D)` of scenes, which are written as mp4 files and read back."""
    found, dtype = [], next(model.parameters()).dtype
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for some in _batches(len(scenes)):
            paths = make_clips(scenes[some], Path(folder))
            found.append(model.encode_video(load_clips(paths, model.config).to(dtype)))
    return torch.cat(found)


def results(
    model: Any, tokenizer: Tokenizer, task: str, embeds: Tensor | None, texts: Sequence[str | None]
) -> list[Alternative]:
    """The best result of each clip, or of each text if embeds is None."""
    respond = model.tasks[task].respond(model, tokenizer)
    return [
        found[0]
        for some in _batches(len(texts))
        for found in respond(None if embeds is None else embeds[some], texts[some])
    ]


def generate_captions(model: Any, tokenizer: Tokenizer, embeds: Tensor) -> list[str]:
    return [found.text for found in results(model, tokenizer, "captioning", embeds, [None] * len(embeds))]


def generate_answers(model: Any, tokenizer: Tokenizer, embeds: Tensor, asked: list[str]) -> list[str]:
    return [found.text for found in results(model, tokenizer, "question_answering", embeds, asked)]


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


def score_boxes(model: Any, tokenizer: Tokenizer, scenes: Scenes, embeds: Tensor) -> dict[str, float]:
    """The share of boxes with an IoU of at least 0.5, and the mean IoU."""
    n = len(scenes)
    asked = [(ways := phrases(scenes, i))[i % len(ways)] for i in range(n)]
    found = torch.tensor([each.box for each in results(model, tokenizer, "grounding", embeds, asked)])
    right = torch.tensor(boxes(scenes, SEEN_FRAMES[-1])).to(found.dtype)
    overlap = iou(corners(found), corners(right))
    return {"boxes": float((overlap >= 0.5).float().mean()), "mean_iou": float(overlap.mean())}


def score_logs(model: Any, tokenizer: Tokenizer, count: int) -> dict[str, float]:
    """The share of texts, given a log of events and a question, that are exactly the event that was asked for."""
    items = [Logs(model.config).sample(i, np.random.default_rng([2, i])).item for i in range(count)]
    found = results(model, tokenizer, "text_generation", None, [item.text for item in items])
    return {"logs": sum(each.text in item.answers for each, item in zip(found, items, strict=True)) / count}


def score_retrieval(model: Any, tokenizer: Tokenizer, galleries: int = 1) -> dict[str, float]:
    """The mean recall at 1 in galleries with a clip of each caption: by the features alone, and with the matching
    head."""
    each = [score_gallery(model, tokenizer, *gallery(number)) for number in range(galleries)]
    return {name: sum(scores[name] for scores in each) / galleries for name in each[0]}


def score_gallery(model: Any, tokenizer: Tokenizer, scenes: Scenes, texts: list[str]) -> dict[str, float]:
    """Recall at 1 in one gallery."""
    embeds = encoded(model, scenes)
    ids, mask = model.config.wording.descriptions(tokenizer, texts, video=True, training=False)
    result, own = {"gallery": len(texts)}, torch.eye(len(texts), dtype=torch.bool)
    for name, k in (("features", 0), ("reranked", RERANKED)):
        found = model.predict("retrieval", image_embeds=embeds, text_ids=ids, text_mask=mask, k=k)
        result[f"caption_of_clip_{name}"] = recalls(found.by_visual, own)["recall@1"] / 100
        result[f"clip_of_caption_{name}"] = recalls(found.by_text, own)["recall@1"] / 100
    return result


def gallery(number: int) -> tuple[Scenes, list[str]]:
    """The first held-out scene of each caption in the gallery of this number, and the captions."""
    texts = all_captions()
    first, found = FIRST_OF_GALLERY + number * GALLERY_SCENES, {}
    while len(found) < len(texts):
        some = held_out_scenes(500, first)
        for i in range(len(some)):
            found.setdefault(caption(some, i), some[i])
        first += len(some)
    return Scenes.joined([found[text] for text in texts]), texts


def score_all(
    model: Any, tokenizer: Tokenizer, scenes: Scenes, galleries: int = 1
) -> tuple[dict[str, float], list[str]]:
    """The scores of all tasks of the model, and the wrong captions and answers."""
    n, embeds = len(scenes), encoded(model, scenes)
    captions = generate_captions(model, tokenizer, embeds)
    asked = {kind: [pick_question(scenes, i, kind) for i in range(n)] for kind in QUESTION_KINDS}
    answers = {kind: generate_answers(model, tokenizer, embeds, asked[kind]) for kind in QUESTION_KINDS}
    result = score(scenes, captions, answers)
    mistakes = [f"{captions[i]!r} should be {text!r}" for i in range(n) if captions[i] != (text := caption(scenes, i))]
    for kind in QUESTION_KINDS:
        wrong = [i for i in range(n) if answers[kind][i] != answer(scenes, i, kind)]
        mistakes += [f"{asked[kind][i]}? {answers[kind][i]!r}, not {answer(scenes, i, kind)!r}" for i in wrong]
    for task in model.tasks.values():
        if isinstance(task, Classification):
            found = results(model, tokenizer, task.name, embeds, [None] * n)
            result["actions"] = sum(each.text == ACTIONS[scenes.action[i]] for i, each in enumerate(found)) / n
    if "grounding" in model.tasks:
        result |= score_boxes(model, tokenizer, scenes, embeds)
    if "text_generation" in model.tasks:
        result |= score_logs(model, tokenizer, n)
    if "retrieval" in model.tasks:
        result |= score_retrieval(model, tokenizer, galleries)
    return result, mistakes


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder. Default: the packaged one.")] = PACKAGED,
    clips: Annotated[int, typer.Option(min=1, help="Number of held-out clips.")] = 500,
    first: Annotated[int, typer.Option(help="Number of the first held-out scene.")] = FIRST_HELD_OUT,
    galleries: Annotated[int, typer.Option(min=1, help="Retrieval: how many galleries, each with other clips.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or int8.")] = "auto",
    keep: Annotated[list[str] | None, typer.Option(help="Layers that int8 does not round.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    mistakes: Annotated[bool, typer.Option(help="List the wrong captions and answers.")] = False,
) -> None:
    """Score all tasks of a checkpoint: captions and answers, and whatever else it was trained for."""
    result, wrong = score_all(*load(checkpoint, dtype, keep or ()), held_out_scenes(clips, first), galleries)
    if mistakes:
        Console(stderr=True).print("\n".join(wrong))
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console())


def _batches(count: int) -> Iterator[slice]:
    return (slice(start, start + BATCH) for start in range(0, count, BATCH))


if __name__ == "__main__":
    typer.run(main)
