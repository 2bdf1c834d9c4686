"""The three implementations behind one interface: the levels of the benchmark as methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.peer import Peer
from bench.weights import fill
from mplug2_fast import MPlug2Config
from mplug2_fast.acceleration import accelerate
from mplug2_fast.model import MPlug2ForCaptioning
from mplug2_fast.ops import explain, layer_norm
from mplug2_fast.reference import MPlug2ForCaptioning as ReferenceForCaptioning


class Implementation:
    """A model with seeded weights on its device. Generation always runs exactly `steps` steps."""

    backend: str

    def __init__(self, config: MPlug2Config, dtype: torch.dtype, device: str, beams: int, steps: int) -> None:
        self.beams, self.steps = beams, steps
        self.model = self.build(config, dtype, device)
        fill(self.model.released_parameters())
        self.prepare()
        # min_length = max_length makes the end token impossible, so that every implementation does the same work.
        self.generation = {"num_beams": beams, "min_length": steps, "max_length": steps}

    def build(self, config: MPlug2Config, dtype: torch.dtype, device: str) -> Any:
        raise NotImplementedError

    def prepare(self) -> None:
        """What is done once, after loading."""

    def vision(self, video: Tensor) -> Tensor:
        """Video `(B, 3, T, H, W)` to visual tokens `(B, S, D)`."""
        return self.model.encode_visual(video)

    def universal(self, visual: Tensor) -> Tensor:
        """Visual tokens to image_embeds `(B, S, D)`."""
        raise NotImplementedError

    def decode(self, embeds: Tensor) -> Tensor:
        """image_embeds to the score of each video's best sequence, `(B,)`."""
        raise NotImplementedError

    def captioning(self, video: Tensor) -> Tensor:
        """Video to the score of its best sequence, `(B,)`."""
        raise NotImplementedError


class Reference(Implementation):
    """The released algorithm, eager."""

    backend = "eager"

    def build(self, config: MPlug2Config, dtype: torch.dtype, device: str) -> ReferenceForCaptioning:
        return ReferenceForCaptioning(config, device="meta", dtype=dtype).to_empty(device=device).eval()

    def universal(self, visual: Tensor) -> Tensor:
        return self.model.visn_emb_norm(visual + self.model.text_encoder.v_module(visual))

    def decode(self, embeds: Tensor) -> Tensor:
        out = self.model._beam_search(embeds, None, self.beams, self.steps, self.steps, 1)
        return out.scores[:, 0]

    def captioning(self, video: Tensor) -> Tensor:
        return self.model.generate(video, **self.generation).scores[:, 0]


class Accelerated(Reference):
    """The reference after `mplug2_fast.accelerate`."""

    def prepare(self) -> None:
        accelerate(self.model)
        weight = self.model.visn_emb_norm.weight
        served = explain(layer_norm, weight.new_zeros(1, weight.shape[0])).chosen
        self.backend = "native, oneDNN" if served == "cpu" else "PyTorch"


class Fast(Implementation):
    """The fast model, as `mplug2_fast.model` runs it."""

    def build(self, config: MPlug2Config, dtype: torch.dtype, device: str) -> MPlug2ForCaptioning:
        served = explain(layer_norm, torch.zeros(1, 1, dtype=dtype, device=device)).chosen
        self.backend = {"cpu": "native, oneDNN", "triton": "Triton, PyTorch"}.get(served or "", "PyTorch")
        return MPlug2ForCaptioning(config, device="meta", dtype=dtype).to_empty(device=device).eval()

    def prepare(self) -> None:
        self.model.pack()

    def universal(self, visual: Tensor) -> Tensor:
        return self.model.visual_norm(visual + self.model.universal(visual))

    def decode(self, embeds: Tensor) -> Tensor:
        return self.model.generate(image_embeds=embeds, **self.generation).scores[:, 0]

    def captioning(self, video: Tensor) -> Tensor:
        return self.model.generate(video, **self.generation).scores[:, 0]


class Compiled(Implementation):
    """The compiled peer."""

    backend = "torch.compile"

    def build(self, config: MPlug2Config, dtype: torch.dtype, device: str) -> Peer:
        peer = Peer(config, device=device, dtype=dtype)
        peer.compile()
        return peer

    def universal(self, visual: Tensor) -> Tensor:
        return self.model.encode_universal(visual)

    def decode(self, embeds: Tensor) -> Tensor:
        return self.model.decode(embeds, self.beams, self.steps, self.steps)[1]

    def captioning(self, video: Tensor) -> Tensor:
        return self.decode(self.model.encode_video(video))


class Frozen(Compiled):
    """The compiled peer with its weights frozen into the graphs and packed for the CPU: every layer has a graph."""

    backend = "torch.compile, frozen"

    def build(self, config: MPlug2Config, dtype: torch.dtype, device: str) -> Peer:
        torch._inductor.config.freezing = True
        torch._dynamo.config.recompile_limit = 1 + max(config.vision.layers, config.text.text_decode_layers)
        return super().build(config, dtype, device)


class Uncompiled(Compiled):
    """The peer's code without compilation, for machines without a compiler and for tests."""

    backend = "eager"

    def build(self, config: MPlug2Config, dtype: torch.dtype, device: str) -> Peer:
        return Peer(config, device=device, dtype=dtype)


IMPLEMENTATIONS: dict[str, type[Implementation]] = {
    "reference": Reference,
    "accelerated": Accelerated,
    "fast": Fast,
    "compiled": Compiled,
    "frozen": Frozen,
    "uncompiled": Uncompiled,
}
