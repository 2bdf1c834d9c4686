"""Make the start of `tasks.toml`: the model of `recipe.toml` with the vocabulary of all tasks.

Run as `python -m examples.moving_shapes.grow [SOURCE] [FOLDER]` from the repository root.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import mplug2_fast as mf
from examples.moving_shapes.generator import vocabulary
from mplug2_fast.checkpoint import from_pretrained, save_pretrained
from mplug2_fast.tasks.grounding import BINS, FIRST_BIN

BUILD = Path("build/moving_shapes")
WAVES = 24


def places(width: int) -> Tensor:
    """Embeddings `(337, width)` of the places of boxes. Neighbouring places have similar ones."""
    place, wave = torch.linspace(0, 1, BINS), torch.arange(WAVES)
    waves = torch.cos(torch.pi * place[:, None] * wave) / (1 + wave)
    rows = waves @ torch.randn(WAVES, width, generator=torch.Generator().manual_seed(0))
    return rows / rows.std()


def grow(source: Path, folder: Path) -> None:
    """Writes the model of a folder with more words. Those that it has keep their ids."""
    old, words = (source / "vocab.txt").read_text().split(), vocabulary()
    assert all(new == word for new, word in zip(words, old, strict=False) if not word.startswith("[unused"))
    model = from_pretrained(source, task="question_answering", pack=False)
    more, tensors = len(words) - len(old), mf.official_state_dict(model)
    torch.manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("word_embeddings.weight"):
            tensors[name] = torch.cat([tensor, 0.02 * torch.randn(more, tensor.shape[1])])
            tensors[name][FIRST_BIN : FIRST_BIN + BINS] = tensor.std() * places(tensor.shape[1])
        elif name.endswith("cls.predictions.bias"):
            tensors[name] = torch.cat([tensor, (tensor.min() - 5).expand(more)])  # not in captions and answers
    grown = mf.MPlug2ForQuestionAnswering(model.config.replace(vocab_size=len(words)))
    mf.load_official(grown, tensors)
    save_pretrained(grown, folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))


def main(
    source: Annotated[Path, typer.Argument(help="Folder of a model for captions and answers.")] = BUILD / "model",
    folder: Annotated[Path, typer.Argument(help="Folder to write.")] = BUILD / "start",
) -> None:
    """Write a model for captions and answers with the vocabulary of all tasks."""
    grow(source, folder)


if __name__ == "__main__":
    typer.run(main)
