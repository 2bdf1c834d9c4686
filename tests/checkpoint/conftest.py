"""Released key lists, and state dicts and files made from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mplug2_fast import MPlug2Config

Shapes = dict[str, tuple[int, ...]]
DATA = Path(__file__).parent / "data"


def read_shapes(name: str) -> Shapes:
    """A key list with its `{first..last}` ranges of layers expanded."""
    shapes: Shapes = {}
    for line in (DATA / name).read_text().splitlines():
        key, shape = line.split(" ", 1)
        layers = re.search(r"\{(\d+)(?:\.\.(\d+))?\}", key)
        for index in range(int(layers[1]), int(layers[2] or layers[1]) + 1) if layers else (None,):
            expanded = key if layers is None else f"{key[: layers.start()]}{index}{key[layers.end() :]}"
            shapes[expanded] = tuple(json.loads(shape))
    return shapes


@pytest.fixture(scope="session")
def golden_shapes() -> Shapes:
    """Everything that a released state dict of the golden size holds."""
    return read_shapes("golden_keys.txt")


@pytest.fixture(scope="session")
def large_shapes() -> Shapes:
    """Everything that a released state dict of the Large model holds."""
    return read_shapes("large_keys.txt")


@pytest.fixture(scope="session")
def golden_config() -> MPlug2Config:
    """The sizes behind `golden_shapes`."""
    return MPlug2Config.from_official(
        bert={
            "hidden_size": 128,
            "num_attention_heads": 2,
            "num_hidden_layers": 4,
            "intermediate_size": 256,
            "vocab_size": 400,
            "max_position_embeddings": 64,
            "text_encoder_layers": 4,
            "fusion_layers": 2,
            "text_decode_layers": 2,
        },
        model={"image_res": 56, "model_num_frames": 4, "prompt": "a video of"},
        clip={"width": 128, "layers": 2, "patch": 14},
    ).replace(clip={"token_width": 64, "token_layers": 1, "token_heads": 1, "bpe_size": 200, "joint_dim": 64})


@pytest.fixture(scope="session")
def make_state_dict() -> Callable[..., dict[str, torch.Tensor]]:
    """shapes -> random weights, the tied ones tied, `position_ids` whole numbers."""

    def make(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weights = {key: 0.05 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        decoder, head = "text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions"
        for key in weights:
            if key.endswith("position_ids"):
                weights[key] = torch.arange(shapes[key][1])[None]
        if f"{head}.decoder.weight" in weights:
            weights[f"{head}.decoder.weight"] = weights[decoder]
            weights[f"{head}.decoder.bias"] = weights[f"{head}.bias"]
        return weights

    return make


@pytest.fixture(scope="session")
def golden_weights(golden_shapes: Shapes, make_state_dict: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """A whole released state dict of the golden size. Not to be changed."""
    return make_state_dict(golden_shapes)


@pytest.fixture
def golden_file(golden_weights: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """An official checkpoint as training saves it."""
    path = tmp_path / "checkpoint.pth"
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(5)}}, "param_groups": [{"lr": 2e-5, "params": [0]}]}
    config = {"image_res": 56, "model_num_frames": 4, "prompt": "a video of", "beam_size": 3, "fusion_layers": 2}
    torch.save({"model": golden_weights, "optimizer": optimizer, "config": config, "epoch": 9}, path)
    return path
