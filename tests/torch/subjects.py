"""The models on which features of PyTorch are tested, each with a twin in plain PyTorch that computes the same."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import mplug2_fast as mf
from tests.tiny import SMALL, pair, random_text, random_video

DIM, HEADS, HIDDEN = 64, 4, 128
ROWS = (6, 100)  # enough rows for packed weights
ONE_OF_EACH = SMALL.replace(layers=1, num_uni_layer=1, text_encoder_layers=1, text_decode_layers=1)
"""One layer of each kind: compilers need seconds for each."""


class Plain(nn.Module):
    """A pre-norm transformer block from torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(DIM, HIDDEN), gelu=nn.GELU(), c_proj=nn.Linear(HIDDEN, DIM))
        )

    def forward(self, x: Tensor) -> Tensor:
        """x and result: `(batch, tokens, DIM)`."""
        h = self.norm(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(x)


class Ours(nn.Module):
    """The same block from mplug2_fast.nn, with the same parameter names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = mf.nn.LayerNorm(DIM)
        self.attn = mf.nn.SelfAttention(DIM, HEADS)
        self.mlp = mf.nn.MLP(DIM, HIDDEN, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """x and result: `(batch, tokens, DIM)`."""
        x = self.attn(self.norm(x), residual=x)
        return self.mlp(x, residual=True)


class CaptioningLoss(nn.Module):
    """A captioning model as a function of the video alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.ids, self.mask = random_text(ONE_OF_EACH, 2, 6)

    def forward(self, video: Tensor) -> Tensor:
        return self.model(video, self.ids, self.mask)


def block() -> nn.Module:
    torch.manual_seed(0)
    model = Plain()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else DIM**-0.5)
    return model.eval()


def modules() -> tuple[nn.Module, nn.Module]:
    twin, ours = block(), Ours().eval()
    ours.load_state_dict(twin.state_dict())
    return ours, twin


def accelerated() -> tuple[nn.Module, nn.Module]:
    twin = block()
    ours = copy.deepcopy(twin)
    mf.accelerate(ours)
    return ours, twin


def captioning() -> tuple[nn.Module, nn.Module]:
    reference, fast = pair(ONE_OF_EACH)
    return CaptioningLoss(fast.pack()), CaptioningLoss(reference)


@dataclass(frozen=True)
class Subject:
    """Attributes:
    make: returns the model under test and its twin, both in evaluation mode.
    inputs: returns a fresh input for a seed.
    """

    make: Callable[[], tuple[nn.Module, nn.Module]]
    inputs: Callable[[int], Tensor]


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(*ROWS, DIM, generator=torch.Generator().manual_seed(seed))


SUBJECTS = {
    "modules": Subject(modules, tokens),
    "accelerated": Subject(accelerated, tokens),
    "captioning": Subject(captioning, lambda seed=0: random_video(ONE_OF_EACH, seed=seed)),
}
BLOCKS = {name: SUBJECTS[name] for name in ("modules", "accelerated")}
