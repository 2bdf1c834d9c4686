"""The implementations behind one interface: each task of the benchmark is a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bench.peer import Peer
from bench.weights import fill
from mplug2_fast import MPlug2Config, reference
from mplug2_fast.acceleration import accelerate
from mplug2_fast.models import mplug2
from mplug2_fast.ops import explain, layer_norm
from mplug2_fast.ops.runtime import cuda


class NoInitialisation(TorchFunctionMode):
    """Skips the random initial values of modules. They take time, and on the meta device PyTorch imports its compiler
    for them, which would count in a process's memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class Implementation:
    """A model with seeded weights on its device, for one family of tasks (`bench.plan.FAMILIES`).

    Generation always runs exactly `steps` steps. Training keeps its parameters in float32 and computes under autocast.
    """

    backend: str
    fused_optimizer = True
    kinds = (mplug2.MPlug2ForCaptioning, mplug2.MPlug2ForQuestionAnswering)

    def __init__(
        self, config: MPlug2Config, dtype: torch.dtype, device: str, beams: int, steps: int, family: str = "captioning"
    ) -> None:
        self.config, self.device, self.beams, self.steps = config, device, beams, steps
        self.trains = family == "training"
        self.weights_dtype = torch.float32 if self.trains else dtype
        self.autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype != self.weights_dtype)
        kind = self.kinds[family == "answering"]
        with NoInitialisation():
            self.model = kind(config, device="meta", dtype=self.weights_dtype).to_empty(device=device).eval()
        fill(self.model.official_parameters())
        self.prepare()
        if self.trains:
            self.model.train().requires_grad_(True)
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=2e-5, weight_decay=0.02, fused=self.fused_optimizer or None
            )
        # min_length = max_length makes the end token impossible, so that every implementation does the same work.
        self.generation = {"num_beams": beams, "min_length": steps, "max_length": steps}

    def prepare(self) -> None:
        """Runs once, after loading."""

    def remarks(self) -> list[str]:
        """After the runs: what was not as it should have been."""
        return []

    def vision(self, video: Tensor) -> Tensor:
        """Video `(batch, 3, frames, height, width)` to visual tokens `(batch, S, D)`."""
        return self.model.encode_visual(video)

    def universal(self, visual: Tensor) -> Tensor:
        """Visual tokens to image_embeds `(batch, S, D)`."""
        raise NotImplementedError

    def features(self, video: Tensor) -> Tensor:
        """Video to image_embeds."""
        return self.model.encode_video(video)

    def decode(self, embeds: Tensor) -> Tensor:
        """image_embeds to the score of each video's best sequence, `(batch,)`."""
        raise NotImplementedError

    def captioning(self, video: Tensor) -> Tensor:
        """Video to the score of its best sequence, `(batch,)`."""
        return self.model.generate(video, **self.generation).scores[:, 0]

    def answering(self, video: Tensor, question: Tensor, mask: Tensor) -> Tensor:
        """Video and question to the score of the best answer, `(batch,)`."""
        out = self.model.generate(video, question_ids=question, question_mask=mask, **self.generation)
        return out.scores[:, 0]

    def loss(self, video: Tensor, caption: Tensor, mask: Tensor) -> Tensor:
        return self.model(video, caption, mask)

    def training(self, video: Tensor, caption: Tensor, mask: Tensor) -> Tensor:
        """One step: loss, gradients, update. Returns the loss."""
        with self.autocast:
            loss = self.loss(video, caption, mask)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def gradients(self, video: Tensor, caption: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
        """Gradients of the loss without dropout, by official name. They stay until the next step."""
        text = self.config.text
        self.model.train(not (text.hidden_dropout_prob or text.attention_probs_dropout_prob))
        with self.autocast:
            loss = self.loss(video, caption, mask)
        loss.backward()
        self.model.train()
        return self.official_gradients()

    def official_gradients(self) -> Mapping[str, Tensor]:
        return self.model.official_gradients()


class Reference(Implementation):
    """The official algorithm, eager."""

    backend = "eager"
    fused_optimizer = False
    kinds = (reference.MPlug2ForCaptioning, reference.MPlug2ForQuestionAnswering)

    def universal(self, visual: Tensor) -> Tensor:
        return self.model.visn_emb_norm(visual + self.model.text_encoder.v_module(visual))

    def decode(self, embeds: Tensor) -> Tensor:
        out = self.model._beam_search(embeds, None, self.beams, self.steps, self.steps, 1)
        return out.scores[:, 0]

    def official_gradients(self) -> Mapping[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}


class Accelerated(Reference):
    """The reference after `mplug2_fast.accelerate`."""

    def prepare(self) -> None:
        accelerate(self.model)
        weight = self.model.visn_emb_norm.weight
        served = explain(layer_norm, weight.new_zeros(1, weight.shape[0])).chosen
        self.backend = "native, oneDNN" if served == "cpu" else "PyTorch"


class Fast(Implementation):
    """The fast model, as `mplug2_fast.models.mplug2` runs it."""

    def prepare(self) -> None:
        x = torch.zeros(1, 1, dtype=self.weights_dtype, device=self.device)
        served = explain(layer_norm, x).chosen
        self.backend = {"cpu": "native, oneDNN", "triton": "Triton, PyTorch"}.get(served or "", "PyTorch")
        if served == "triton" and not cuda.reasons(x):
            self.backend = f"CUDA, {self.backend}"
        if not self.trains:
            self.model.pack()

    def remarks(self) -> list[str]:
        return [] if self.model.cuda_graphs else ["it runs without CUDA graphs because capturing one failed"]

    def universal(self, visual: Tensor) -> Tensor:
        return self.model.visual_norm(visual + self.model.universal(visual))

    def decode(self, embeds: Tensor) -> Tensor:
        return self.model.generate(image_embeds=embeds, **self.generation).scores[:, 0]


class Eager(Implementation):
    """The peer's code without compilation."""

    backend = "eager"

    def prepare(self) -> None:
        self.model.requires_grad_(False)
        self.peer = Peer(self.model)

    def vision(self, video: Tensor) -> Tensor:
        return self.peer.encode_visual(video)

    def universal(self, visual: Tensor) -> Tensor:
        return self.peer.encode_universal(visual)

    def features(self, video: Tensor) -> Tensor:
        return self.peer.encode_video(video)

    def decode(self, embeds: Tensor) -> Tensor:
        return self.peer.decode(embeds, self.beams, self.steps, self.steps)[1]

    def captioning(self, video: Tensor) -> Tensor:
        return self.decode(self.peer.encode_video(video))

    def answering(self, video: Tensor, question: Tensor, mask: Tensor) -> Tensor:
        memory, memory_mask = self.peer.encode_question(video, question, mask)
        return self.peer.decode(memory, self.beams, self.steps, self.steps, memory_mask)[1]

    def loss(self, video: Tensor, caption: Tensor, mask: Tensor) -> Tensor:
        return self.peer.loss(video, caption)


class Compiled(Eager):
    """The compiled peer."""

    backend = "torch.compile"

    def prepare(self) -> None:
        super().prepare()
        self.peer.compile(torch.device(self.device).type)

    def remarks(self) -> list[str]:
        """The compiler drops CUDA graphs without a warning."""
        skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        return [f"{skipped} compiled graphs should run as CUDA graphs and do not"] if skipped else []


class Frozen(Compiled):
    """The compiled peer with its weights frozen into the graphs and packed for the CPU: one graph per layer."""

    backend = "torch.compile, frozen"

    def prepare(self) -> None:
        text = self.config.text
        bert_layers = text.text_encoder_layers + text.num_uni_layer + text.fusion_layers
        torch._inductor.config.freezing = True
        torch._dynamo.config.recompile_limit = 1 + max(self.config.vision.layers, text.text_decode_layers, bert_layers)
        super().prepare()


IMPLEMENTATIONS: dict[str, type[Implementation]] = {
    "reference": Reference,
    "accelerated": Accelerated,
    "fast": Fast,
    "eager": Eager,
    "compiled": Compiled,
    "frozen": Frozen,
}
