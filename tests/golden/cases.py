"""A golden case: an official configuration, its weights and inputs, and what the official code computed from them."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.golden import weights

FOLDER = Path(__file__).parent
CAPTIONING, QUESTION_ANSWERING = ("caption_a", "caption_b"), ("qa_a",)
MPLUG = ("mplug_caption", "mplug_grounding", "mplug_retrieval", "mplug_video", "mplug_vqa")
STORED = (*CAPTIONING, *QUESTION_ANSWERING, *MPLUG)


class CaseError(Exception):
    """A golden case that cannot be read."""


class Entries(dict[str, Any]):
    """The entries of one file of a case. The error for an absent one names the file."""

    def __init__(self, file: Path, entries: dict[str, Any]) -> None:
        super().__init__(entries)
        self.file = file

    def __missing__(self, name: str) -> Any:
        raise CaseError(f"{self.file} has no entry {name!r}")


@dataclass(frozen=True)
class GoldenCase:
    """The case in `folder`: a path, or the name of a case that is stored here."""

    folder: str | Path

    @property
    def path(self) -> Path:
        return FOLDER / self.folder

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def description(self) -> Entries:
        file = self.path / "case.json"
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CaseError(f"{file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise CaseError(f"{file} is not JSON: {error}") from error
        if not isinstance(entries, dict):
            raise CaseError(f"{file} must hold an object, got {type(entries).__name__}")
        return Entries(file, entries)

    @cached_property
    def inputs(self) -> Entries:
        return self._arrays("inputs.npz")

    @cached_property
    def expected(self) -> Entries:
        return self._arrays("expected.npz")

    def _arrays(self, name: str) -> Entries:
        file = self.path / name
        try:
            with np.load(file) as arrays:
                return Entries(file, {key: torch.as_tensor(value) for key, value in arrays.items()})
        except FileNotFoundError as error:
            raise CaseError(f"{file} cannot be read: {error.strerror}") from error
        except (OSError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise CaseError(f"{file} is not a file of arrays: {error}") from error

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """Every entry of the official state dict."""
        case = self.description
        values = weights.state_dict(case["keys"], case["seed"], case["eos_bias"], case.get("queue_ptr", 0))
        return {key: torch.as_tensor(value) for key, value in values.items()}

    @cached_property
    def video(self) -> Tensor:
        """The normalised video `(batch, 3, frames, height, width)`, or images as videos of one frame."""
        generator = np.random.RandomState(1000 + self.description["seed"])
        shape = self.description.get("image_shape") or self.description["video_shape"]
        values = torch.as_tensor(generator.standard_normal(shape).astype(np.float32))
        return values[:, :, None] if len(shape) == 4 else values

    @cached_property
    def picture(self) -> np.ndarray:
        """The picture that preprocessing starts from: `(height, width, 3)`, uint8."""
        generator = np.random.RandomState(2000 + self.description["seed"])
        return generator.randint(0, 256, self.description["picture_shape"]).astype(np.uint8)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, divided by that of `expected`."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
