"""Golden cases: the released configuration, its inputs, the weights that follow from the keys, and what came out."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import mplug2_fast as mf

FOLDER = Path(__file__).parent
CAPTIONING, QUESTION_ANSWERING = ("caption_a", "caption_b"), ("qa_a",)
END_OF_SEQUENCE = 102
EMBEDDING_PARTS = ("embeddings.", "token_embedding", "positional_embedding", "class_embedding", "latents")


def weight(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The value stored under `key`, from NumPy's legacy generator, whose stream is frozen across versions."""
    normal = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(shape).astype(np.float32)
    vector = len(shape) == 1
    if key.endswith("logit_scale"):
        return np.asarray(np.log(1 / 0.07), dtype=np.float32)
    if key.endswith("position_ids"):
        return np.arange(shape[-1], dtype=np.int64)[None]
    if vector and key.endswith(".weight"):  # a layer norm
        return 1 + 0.1 * normal
    if "word_embeddings" in key:
        return normal * np.float32(0.2 * np.sqrt(128) / np.sqrt(shape[1]))
    if "position_embeddings" in key:
        return 0.7 * normal
    if any(part in key for part in EMBEDDING_PARTS):
        return 0.5 * normal
    if vector:  # a bias
        return 0.1 * normal
    if "lmhra" in key and ".conv.weight" in key:
        return 0.5 * normal
    return normal / np.sqrt(np.prod(shape[1:])).astype(np.float32)


@dataclass(frozen=True)
class GoldenCase:
    name: str

    @cached_property
    def description(self) -> dict:
        return json.loads((FOLDER / self.name / "case.json").read_text())

    @cached_property
    def config(self) -> mf.MPlug2Config:
        case = self.description
        return mf.MPlug2Config.from_released(bert=case["bert"], model=case["config"], clip=case["clip"])

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return {key: torch.as_tensor(value) for key, value in np.load(FOLDER / self.name / "inputs.npz").items()}

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        return {key: torch.as_tensor(value) for key, value in np.load(FOLDER / self.name / "expected.npz").items()}

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """Every entry of the released state dict, the tied ones tied."""
        case = self.description
        weights = {key: weight(key, tuple(shape), case["seed"]) for key, shape in case["keys"].items()}
        head = "text_decoder.cls.predictions"
        weights[f"{head}.bias"] = weights[f"{head}.bias"].copy()
        weights[f"{head}.bias"][END_OF_SEQUENCE] = case["eos_bias"]
        weights[f"{head}.decoder.bias"] = weights[f"{head}.bias"]
        weights[f"{head}.decoder.weight"] = weights["text_decoder.bert.embeddings.word_embeddings.weight"]
        return {key: torch.as_tensor(value) for key, value in weights.items()}

    @cached_property
    def video(self) -> Tensor:
        generator = np.random.RandomState(1000 + self.description["seed"])
        return torch.as_tensor(generator.standard_normal(self.description["video_shape"]).astype(np.float32))

    @property
    def question(self) -> dict[str, Tensor]:
        return {key: self.inputs[key] for key in ("question_ids", "question_mask") if key in self.inputs}

    def model(self, library) -> torch.nn.Module:
        """The task's model of `mplug2_fast` or `mplug2_fast.reference` with this case's weights, in eval mode."""
        kind = library.MPlug2ForCaptioning if self.name in CAPTIONING else library.MPlug2ForQuestionAnswering
        model = kind(self.config).eval()
        for key, view in model.released_parameters().items():
            view.copy_(self.state_dict[key])
        return model

    def loss(self, model: torch.nn.Module) -> Tensor:
        """One training step's loss, dropout off."""
        names = (
            ("caption_ids", "caption_mask")
            if self.name in CAPTIONING
            else (
                "question_ids",
                "question_mask",
                "answer_ids",
                "answer_mask",
                "answers_per_question",
                "answer_weights",
            )
        )
        return model(self.video, *(self.inputs[name] for name in names))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
