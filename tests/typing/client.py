"""A small user of the public interface for type checkers. It is never run: see test_client.py."""

from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import mplug2_fast as mf


def caption(checkpoint: Path, files: list[str]) -> dict[str, str | None]:
    captioner = mf.Captioner(checkpoint, dtype="bfloat16", device="cpu")
    return {result.path: result.text for result in captioner.caption(files, num_beams=5)}


def answer(files: list[str], question: str) -> list[str]:
    results = list(mf.Answerer().answer(files, question))
    return [result.text or result.error or "" for result in results]


def generate(checkpoint: Path, file: str) -> mf.GenerationOutput:
    if not assert_type(mf.checkpoint.inspect(checkpoint).ok, bool):
        raise mf.CheckpointError(f"{checkpoint} is not usable")
    model = mf.from_pretrained(checkpoint, task="captioning", dtype=torch.float32)
    video = assert_type(mf.load_video(file, num_frames=16, image_size=224), Tensor)
    return assert_type(model.generate(video[None], num_beams=5, num_return=2), mf.GenerationOutput)


def build(preset: str) -> mf.MPlug2ForQuestionAnswering:
    config = assert_type(mf.MPlug2Config.preset(preset), mf.MPlug2Config)
    assert_type(config.text.hidden_size, int)
    return mf.MPlug2ForQuestionAnswering(config, device="meta").pack()


def accelerate(model: nn.Module, x: Tensor) -> Tensor:
    report = assert_type(mf.accelerate(model), mf.acceleration.Report)
    print(report, [entry.path for entry in report.entries])
    mf.restore(model)
    with mf.ops.use_backend("torch"):
        normed = assert_type(mf.ops.layer_norm(x, eps=1e-6), Tensor)
    block = mf.nn.TemporalBlock(x.shape[-1], 2)
    out: Tensor = block(mf.nn.LocalTemporal(x.shape[-1])(normed))
    return out
