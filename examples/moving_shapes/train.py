"""Train the tiny model from scratch on moving shapes. Each step uses new clips, with captions and answers.

Run as `python -m examples.moving_shapes.train OUTPUT_FOLDER` from the repository root.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor, nn

import mplug2_fast as mf
from examples.moving_shapes.generator import (
    QUESTION_KINDS,
    answer,
    caption,
    questions,
    sample_scenes,
    training_frames,
    training_rng,
    vocabulary,
)
from mplug2_fast.checkpoint import save_pretrained
from mplug2_fast.ops import preprocess_frames
from mplug2_fast.text import Tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, except the number of threads."""

    round_steps: int = 5000
    learning_rates: tuple[float, ...] = (5e-4, 3e-4)
    """One per round. A round starts with a new optimizer and rounds the weights to float16, as in a checkpoint."""
    batch_size: int = 32
    warmup_steps: int = 100
    weight_decay: float = 0.02
    answer_weight: float = 0.5
    gradient_clip: float = 1.0
    local_temporal: bool = True
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.round_steps * len(self.learning_rates)


@dataclass(frozen=True)
class Batch:
    """One training batch: clips, each with its caption and one question of a random kind."""

    video: Tensor
    caption: tuple[Tensor, Tensor]
    question: tuple[Tensor, Tensor]
    answer: tuple[Tensor, Tensor]


def make_tokenizer() -> Tokenizer:
    return Tokenizer(vocabulary())


def make_batch(recipe: Recipe, step: int, tokenizer: Tokenizer, image_size: int = 32) -> Batch:
    """The batch of one step. It depends only on the seed and the step."""
    rng = training_rng(recipe.seed, step)
    scenes = sample_scenes(rng, recipe.batch_size)
    frames = training_frames(scenes, rng, image_size)
    kinds = [QUESTION_KINDS[k] for k in rng.integers(len(QUESTION_KINDS), size=len(scenes))]
    asked = [str(rng.choice(questions(scenes, i, kind))) for i, kind in enumerate(kinds)]
    return Batch(
        video=as_video(frames),
        caption=tokenizer.encode_captions([caption(scenes, i) for i in range(len(scenes))]),
        question=tokenizer.encode_questions(asked),
        answer=tokenizer.encode_answers([answer(scenes, i, kind) for i, kind in enumerate(kinds)]),
    )


def as_video(frames) -> Tensor:
    """uint8 frames `(batch, frames, height, width, 3)` to float32 `(batch, 3, frames, height, width)`."""
    batch, time_, height, width, _ = frames.shape
    flat = torch.from_numpy(frames).view(batch * time_, height, width, 3)
    return preprocess_frames(flat, height).view(3, batch, time_, height, width).transpose(0, 1).contiguous()


def make_model(recipe: Recipe) -> mf.MPlug2ForQuestionAnswering:
    """The tiny model with new weights.

    The standard deviation of matrices preserves the scale of their inputs. That of word embeddings is 0.02. That of
    positions is large enough to show beside patches, which have scale 1. Local temporal modules start as the identity.
    The ablation never trains them, so its encoder computes as if they were absent.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    config = mf.MPlug2Config.preset("tiny").replace(vocab_size=len(vocabulary()))
    model = mf.MPlug2ForQuestionAnswering(config)
    for name, weight in model.official_parameters().items():
        if ".up_proj." in name or name.endswith("bias"):
            weight.zero_()
        elif name.endswith(("positional_embedding", "class_embedding")):
            weight.normal_(std=0.5, generator=generator)
        elif name.endswith(("embeddings.weight", "latents")):
            weight.normal_(std=0.02, generator=generator)
        elif weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
    if not recipe.local_temporal:
        for block in model.visual.blocks:
            block.lmhra1.requires_grad_(False)
            block.lmhra2.requires_grad_(False)
    return model


def make_optimizer(
    model: nn.Module, recipe: Recipe, learning_rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW without decay for biases and norms. Linear warm-up, then a cosine to zero at the end of the round."""
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in learned if p.ndim > 1], [p for p in learned if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)

    def factor(step: int) -> float:
        if step < recipe.warmup_steps:
            return (step + 1) / recipe.warmup_steps
        done = (step - recipe.warmup_steps) / max(1, recipe.round_steps - recipe.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * done))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def losses(
    model: mf.MPlug2ForQuestionAnswering, captioner: mf.MPlug2ForCaptioning, batch: Batch
) -> tuple[Tensor, Tensor]:
    """The captioning and the question answering loss. The clips are encoded once."""
    image_embeds = model.encode_video(batch.video)
    n = len(image_embeds)
    ones = torch.ones(n)
    caption_loss = captioner(None, *batch.caption, image_embeds=image_embeds)
    answer_loss = model(
        None, *batch.question, *batch.answer, torch.ones(n, dtype=torch.int64), ones, image_embeds=image_embeds
    )
    return caption_loss, answer_loss


class Trainer:
    """A model with its optimizer, and the index of the next step."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer = make_tokenizer()
        self.model = make_model(recipe).train()
        self.captioner = self.model.captioner()
        self.step = 0

    def resume(self, folder: Path) -> None:
        """Continue after the first round, from the checkpoint written at its end."""
        mf.load_released(self.model, load_file(folder / "model.safetensors"))
        self.step = self.recipe.round_steps

    def _start_round(self) -> None:
        if self.step:
            for weight in self.model.official_parameters().values():
                weight.copy_(weight.half())
        rate = self.recipe.learning_rates[self.step // self.recipe.round_steps]
        self.optimizer, self.schedule = make_optimizer(self.model, self.recipe, rate)

    def train_step(self) -> tuple[float, float]:
        """Make one update. Returns the captioning and the question answering loss before it."""
        if self.step % self.recipe.round_steps == 0:
            self._start_round()
        batch = make_batch(self.recipe, self.step, self.tokenizer)
        caption_loss, answer_loss = losses(self.model, self.captioner, batch)
        self.optimizer.zero_grad(set_to_none=True)
        (caption_loss + self.recipe.answer_weight * answer_loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clip)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return caption_loss.item(), answer_loss.item()

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors in float16, and vocab.txt."""
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as vocab:
            vocab.write("\n".join(vocabulary()) + "\n")
            vocab.flush()
            save_pretrained(self.model, folder, dtype=torch.float16, vocab=vocab.name)


def main(
    output: Annotated[Path, typer.Argument(help="Folder to write the checkpoint to.")],
    round_steps: Annotated[int, typer.Option(help="Updates per round; there are two rounds.")] = Recipe.round_steps,
    seed: Annotated[int, typer.Option(help="Seed of weights and clips.")] = Recipe.seed,
    local_temporal: Annotated[
        bool, typer.Option(help="Whether the encoder sees the order of frames; --no-local-temporal is the ablation.")
    ] = True,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: PyTorch's choice.")] = None,
    log: Annotated[Path | None, typer.Option(help="File for a JSON line every 50 steps.")] = None,
    save_every: Annotated[int, typer.Option(help="Also save to OUTPUT-STEP every N steps; 0 never.")] = 0,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint of the first round: run only the second.")] = None,
) -> None:
    """Train the tiny model on moving shapes and save it."""
    if threads:
        torch.set_num_threads(threads)
    if output.exists():
        raise typer.BadParameter(f"{output} exists: name a new folder")
    recipe = Recipe(round_steps=round_steps, seed=seed, local_temporal=local_temporal)
    console = Console(stderr=True)
    trainer = Trainer(recipe)
    if resume:
        trainer.resume(resume)
    size = sum(p.numel() for p in trainer.model.parameters())
    console.print(f"{size / 1e6:.2f}M parameters, {recipe}")
    started, started_cpu = time.perf_counter(), time.process_time()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    mean_caption = mean_answer = None
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=recipe.steps, completed=trainer.step)
        for step in range(trainer.step + 1, recipe.steps + 1):
            caption_loss, answer_loss = trainer.train_step()
            if not math.isfinite(caption_loss + answer_loss):
                console.print(f"[red]the loss is not finite at step {step}: lower the learning rate")
                raise typer.Exit(1)
            mean_caption = caption_loss if mean_caption is None else 0.98 * mean_caption + 0.02 * caption_loss
            mean_answer = answer_loss if mean_answer is None else 0.98 * mean_answer + 0.02 * answer_loss
            progress.update(bar, advance=1, description=f"captions {mean_caption:.3f}, answers {mean_answer:.3f}")
            if step % 50 == 0 or step == recipe.steps:
                line = {
                    "step": step,
                    "caption_loss": round(mean_caption, 4),
                    "answer_loss": round(mean_answer, 4),
                    "seconds": round(time.perf_counter() - started, 1),
                    "cpu_seconds": round(time.process_time() - started_cpu, 1),
                }
                if not console.is_terminal:
                    console.print_json(json.dumps(line), indent=None)
                if log:
                    with log.open("a") as file:
                        file.write(json.dumps(line) + "\n")
            if save_every and step % save_every == 0:
                trainer.save(output.with_name(f"{output.name}-{step}"))
    trainer.save(output)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    console.print(f"saved {output} after {seconds:.0f} s, {cpu_seconds:.0f} s of CPU time")


if __name__ == "__main__":
    typer.run(main)
