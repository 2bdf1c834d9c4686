"""Score a checkpoint on held-out pictures: captions, answers, boxes, and retrieval in both directions.

Run as `python -m examples.shapes.evaluate [CHECKPOINT]` from the repository root.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

import mplug2_fast as mf
from examples.shapes.data import example
from examples.shapes.language import ANSWERS, QUESTION_KINDS, RELATIONS
from examples.shapes.write import FIRST, write
from mplug2_fast.checkpoint import from_pretrained
from mplug2_fast.datasets import Item, read_items
from mplug2_fast.evaluation.recall import recalls
from mplug2_fast.tasks.grounding import corners, iou
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import Sample
from mplug2_fast.training.data import video_of

PACKAGED = Path(mf.__file__).parent / "data" / "tiny_mplug"
TASKS = ("captioning", "question_answering", "grounding", "retrieval")
RERANKED = 16
"""Candidates of each query that the matching head scores."""
QUESTIONS = 20_000
"""Training questions that the best guess without a picture is learned from."""


def score(model: Any, tokenizer: Tokenizer, items: Sequence[Item], batch_size: int = 50) -> dict[str, float]:
    """Shares of exactly right captions and answers, of boxes with an IoU of at least 0.5, and of pictures and captions
    that are found first among all."""
    size, config, dtype = model.config.vision.image_size, model.config, next(model.parameters()).dtype
    pictures = [Sample(item, np.array(Image.open(item.image))[None]) for item in items]
    starts = range(0, len(items), batch_size)
    with torch.inference_mode():
        batches = (video_of(pictures[at : at + batch_size], size).to(dtype) for at in starts)
        embeds = torch.cat([model.encode_video(batch) for batch in batches])

    def results(task: str) -> list[Any]:
        texts = [model.tasks[task].text_of(item, config) for item in items]
        respond = model.tasks[task].respond(model, tokenizer)
        return [
            found[0]
            for at in starts
            for found in respond(embeds[at : at + batch_size], texts[at : at + batch_size])
        ]  # fmt: skip

    right: dict[str, list[bool]] = defaultdict(list)
    for item, caption in zip(items, results("captioning"), strict=True):
        right["captions"].append(caption.text in item.caption)
    for item, answer in zip(items, results("question_answering"), strict=True):
        for name in ("answers", f"answers_{item.extra['kind']}"):
            right[name].append(answer.text in item.answers)
    boxes, targets = torch.tensor([found.box for found in results("grounding")]), torch.tensor([i.box for i in items])
    overlaps = iou(corners(boxes).clamp(0, 1), corners(targets)).tolist()
    for item, overlap in zip(items, overlaps, strict=True):
        related = any(f" {relation} " in str(item.text) for relation in RELATIONS)
        for name in ("boxes", f"boxes_{'related' if related else 'plain'}"):
            right[name].append(overlap >= 0.5)
    result = {name: float(np.mean(values)) for name, values in sorted(right.items())}
    return {**result, "mean_iou": float(np.mean(overlaps)), **retrieval(model, tokenizer, items, embeds)}


def retrieval(model: Any, tokenizer: Tokenizer, items: Sequence[Item], embeds: torch.Tensor) -> dict[str, float]:
    """Recall at 1 among all items: by the features alone, and with the matching head."""
    texts = [item.caption[0] for item in items]
    ids, mask = model.config.wording.descriptions(tokenizer, texts, video=False, training=False)
    result = {"gallery": len(items)}
    for name, k in (("features", 0), ("reranked", RERANKED)):
        found = model.predict("retrieval", image_embeds=embeds, text_ids=ids, text_mask=mask, k=k)
        own = torch.eye(len(items), dtype=torch.bool)
        result[f"caption_of_picture_{name}"] = recalls(found.by_visual, own)["recall@1"] / 100
        result[f"picture_of_caption_{name}"] = recalls(found.by_text, own)["recall@1"] / 100
    return result


def without_pictures(items: Sequence[Item]) -> dict[str, float]:
    """The share of questions that are answered rightly by the most frequent answer of the same question in training."""
    rng = np.random.default_rng(0)
    known: dict[str, Counter[str]] = defaultdict(Counter)
    for _ in range(QUESTIONS):
        item = example(rng, held_out=False)[1]
        for name in (str(item.question), str(item.extra["kind"])):
            known[name].update(item.answers)
    right = []
    for item in items:
        counts = known.get(str(item.question)) or known[str(item.extra["kind"])]
        right.append(counts.most_common(1)[0][0] in item.answers)
    guess = np.mean([1 / len(ANSWERS[kind]) for kind in QUESTION_KINDS])
    return {"question_only": float(np.mean(right)), "uniform_guess": float(guess)}


def show(result: dict[str, float], console: Console) -> None:
    table = Table(title=f"{result['pictures']} held-out pictures")
    table.add_column("right")
    table.add_column("%", justify="right")
    for name, value in result.items():
        if isinstance(value, float):
            table.add_row(name.replace("_", " "), f"{100 * value:.1f}")
    console.print(table)


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder. Default: the packaged one.")] = PACKAGED,
    pictures: Annotated[int, typer.Option(min=1, help="Number of held-out pictures.")] = 500,
    first: Annotated[int, typer.Option(help="Number of the first held-out picture.")] = FIRST,
    blind: Annotated[bool, typer.Option(help="Also score the best guess from the question alone.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or int8.")] = "auto",
    keep: Annotated[list[str] | None, typer.Option(help="Layers that int8 does not round.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Caption held-out pictures, answer questions about them, find objects in them, and find them by their captions."""
    model = from_pretrained(checkpoint, tasks=TASKS, dtype=dtype, keep=keep or ())
    tokenizer = Tokenizer.from_vocab(checkpoint / "vocab.txt", vocab_size=model.config.text.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), pictures, first)
        items = read_items(Path(folder) / "test.jsonl")
        result = {"pictures": pictures, **score(model, tokenizer, items)}
    if blind:
        result |= without_pictures(items)
    if as_json:
        print(json.dumps({name: round(value, 4) for name, value in result.items()}, indent=2))
    else:
        show(result, Console())


if __name__ == "__main__":
    typer.run(main)
