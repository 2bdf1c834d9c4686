"""The implementations behind one interface: each task of the benchmark is a method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import mplug2_fast as mf
from bench.peer import Peer
from bench.weights import fill
from mplug2_fast.acceleration import accelerate
from mplug2_fast.checkpoint.eight_bit import others_dtype
from mplug2_fast.devices import eight_bit
from mplug2_fast.ops import explain, layer_norm
from mplug2_fast.ops.runtime import cuda
from mplug2_fast.tasks.features import SPACES
from mplug2_fast.tasks.matching import match_pairs
from mplug2_fast.training.optimizer import make_optimizer, official_of_parameters
from mplug2_fast.training.recipe import Optimizer
from mplug2_fast.training.world import checkpoint_activations, layers_of

MODEL_TASKS = {
    "answering": ("question_answering", "answer_ranking", "grounding"),
    "retrieval": ("retrieval",),
}
"""Family of the benchmark's tasks -> tasks of the model; otherwise captioning."""


def build(library: Any, config: Any, family: str, **options: Any) -> nn.Module:
    """The model of `library`, mplug2_fast or its reference, for a family of tasks."""
    if config.family == "mplug":
        return library.MPlug(config, MODEL_TASKS.get(family, ("captioning",)), **options)
    if family == "retrieval" and library is mf:
        return mf.MPlug2(config, MODEL_TASKS[family], **options)
    kinds = {"answering": "MPlug2ForQuestionAnswering", "retrieval": "MPlug2ForRetrieval"}
    return getattr(library, kinds.get(family.removesuffix(" step"), "MPlug2ForCaptioning"))(config, **options)


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
    library: Any = mf

    def __init__(
        self, config: Any, dtype: torch.dtype, device: str, beams: int, steps: int, family: str = "captioning"
    ) -> None:
        self.config, self.device, self.beams, self.steps = config, device, beams, steps
        self.trains, self.eight_bit = family.endswith("step"), eight_bit(dtype)
        if self.eight_bit is not None:
            dtype = others_dtype(torch.device(device))
        self.weights_dtype = torch.float32 if self.trains else dtype
        self.autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype != self.weights_dtype)
        self.answers = family.startswith("answering")
        with NoInitialisation():
            model = build(self.library, config, family, device="meta", dtype=self.weights_dtype)
            self.model = model.to_empty(device=device).eval()
        fill(self.model.official_parameters())
        self.prepare()
        if self.trains:
            self.model.train().requires_grad_(True)
            self.optimizer = self.make_optimizer()
        # min_length = max_length makes the end token impossible, so that every implementation does the same work.
        self.generation = {"num_beams": beams, "min_length": steps, "max_length": steps}

    def prepare(self) -> None:
        """Runs once, after loading."""

    def remarks(self) -> list[str]:
        """After the runs: what was not as it should have been."""
        return []

    def method(self, task: str) -> Callable[..., Tensor]:
        """The method of a task, which may say how long its texts are."""
        return getattr(self, task.removesuffix(" long texts").removeprefix("long ").replace(" ", "_").replace("-", "_"))

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

    def ranking(self, video: Tensor, question: Tensor, mask: Tensor, answers: Tensor, answers_mask: Tensor) -> Tensor:
        """log p of each of the answers `(answers, tokens)`, among them all: `(batch, answers)`."""
        raise NotImplementedError

    def grounding(self, video: Tensor, phrase: Tensor, mask: Tensor) -> Tensor:
        """The logits of the places of the first coordinate `(batch, places)`. The others follow from it."""
        raise NotImplementedError

    def text_states(self, texts: Tensor, mask: Tensor) -> Tensor:
        """Texts `(texts, tokens)` to hidden states."""
        raise NotImplementedError

    def retrieval_features(self, video: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        """The features of videos and texts, one after another `(batch + texts, embed_dim)`."""
        raise NotImplementedError

    def re_ranking(self, embeds: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """image_embeds and hidden states of texts to the matching logits `(batch, texts)`."""
        raise NotImplementedError

    def answering(self, video: Tensor, question: Tensor, mask: Tensor) -> Tensor:
        """Video and question to the score of the best answer, `(batch,)`."""
        out = self.model.generate(video, question_ids=question, question_mask=mask, **self.generation)
        return out.scores[:, 0]

    def loss(self, *inputs: Tensor) -> Tensor:
        """Of a caption or an answer for each video."""
        if self.answers:
            ids = inputs[3]
            inputs = (*inputs, torch.ones_like(ids[:, 0]), torch.ones(len(ids), device=ids.device))
        return self.model(*inputs)

    def make_optimizer(self) -> torch.optim.AdamW:
        """AdamW with the official groups: two learning rates, and no weight decay for biases and norms."""
        return make_optimizer(self.model, official_of_parameters(self.model), Optimizer())

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Keeps only the inputs of layers for the backward pass."""
        checkpoint_activations(self.model)
        try:
            yield
        finally:
            for layer in layers_of(self.model):
                del layer.forward

    def step(self, inputs: Sequence[Tensor], *, checkpointed: bool = False) -> Tensor:
        """One step: loss, gradients, clipping, update. Returns the loss."""
        loss = self._backward(inputs, checkpointed)
        nn.utils.clip_grad_norm_(self.model.parameters(), Optimizer().gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradients(self, inputs: Sequence[Tensor], *, checkpointed: bool = False) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss without dropout, and its gradients by official name. They stay until the next step."""
        text = self.config.text
        self.model.train(not (text.hidden_dropout_prob or text.attention_probs_dropout_prob))
        loss = self._backward(inputs, checkpointed)
        self.model.train()
        return loss, self.official_gradients()

    def _backward(self, inputs: Sequence[Tensor], checkpointed: bool) -> Tensor:
        with self.recomputing() if checkpointed else nullcontext():
            with self.autocast:
                loss = self.loss(*inputs)
            loss.backward()
        return loss.detach()

    def official_gradients(self) -> Mapping[str, Tensor]:
        return self.model.official_gradients()


class Reference(Implementation):
    """The official algorithm, eager."""

    backend = "eager"
    library = mf.reference

    def universal(self, visual: Tensor) -> Tensor:
        return self.model.visn_emb_norm(visual + self.model.text_encoder.v_module(visual))

    def decode(self, embeds: Tensor) -> Tensor:
        out = self.model._beam_search(embeds, None, self.beams, self.steps, self.steps, 1)
        return out.scores[:, 0]

    def text_states(self, texts: Tensor, mask: Tensor) -> Tensor:
        return self.model.text_encoder(texts, mask)

    def retrieval_features(self, video: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        visual, text = self.model.encode_video(video), self.model.text_encoder(texts, mask)
        return torch.cat([self.model.image_feature(visual), self.model.text_feature(text)])

    def re_ranking(self, embeds: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Each pair is fused alone, with its own keys and values."""
        pairs = (self.model.match(visual.expand(len(states), -1, -1), states, mask)[:, 1] for visual in embeds)
        return torch.stack(list(pairs))

    def make_optimizer(self) -> torch.optim.AdamW:
        settings = Optimizer()
        groups = [
            {name: group[name] for name in ("params", "lr", "weight_decay")}
            for group in make_optimizer(self.model, {}, settings).param_groups
        ]
        return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)

    def official_gradients(self) -> Mapping[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}


class MPlugReference(Reference):
    """mPLUG's official algorithm, eager."""

    def vision(self, video: Tensor) -> Tensor:
        return self.model.encode_video(video)

    def captioning(self, video: Tensor) -> Tensor:
        return self.model.search(self.model.encode_video(video), None, **self.generation).scores[:, 0]

    def _memory(self, video: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.memory(self.model.encode_video(video), text, mask)

    def answering(self, video: Tensor, question: Tensor, mask: Tensor) -> Tensor:
        return self.model.search(*self._memory(video, question, mask), **self.generation).scores[:, 0]

    def ranking(self, video: Tensor, question: Tensor, mask: Tensor, answers: Tensor, answers_mask: Tensor) -> Tensor:
        visual = self.model.encode_video(video)
        return in_order(*self.model.rank_answers(visual, question, mask, answers, answers_mask, len(answers)))

    def grounding(self, video: Tensor, phrase: Tensor, mask: Tensor) -> Tensor:
        return self.model.ground(self.model.encode_video(video), phrase, mask)[2][:, 0]


def in_order(indices: Tensor, probabilities: Tensor) -> Tensor:
    """log p of answers in the order in which they were given."""
    return torch.empty_like(probabilities).scatter_(1, indices, probabilities.log())


class Accelerated(Reference):
    """The reference after `mplug2_fast.accelerate`."""

    def prepare(self) -> None:
        accelerate(self.model)
        weight = self.model.visn_emb_norm.weight
        served = explain(layer_norm, weight.new_zeros(1, weight.shape[0])).chosen
        self.backend = "native, oneDNN" if served == "cpu" else "PyTorch"


class Fast(Implementation):
    """The fast model."""

    def prepare(self) -> None:
        x = torch.zeros(1, 1, dtype=self.weights_dtype, device=self.device)
        served = explain(layer_norm, x).chosen
        self.backend = {"cpu": "native, oneDNN", "triton": "Triton, PyTorch"}.get(served or "", "PyTorch")
        if served == "triton" and not cuda.reasons(x):
            self.backend = f"CUDA, {self.backend}"
        if self.eight_bit is not None:
            self.model.eval().quantise(dtype=self.eight_bit)
        if not self.trains:
            self.model.pack()

    def remarks(self) -> list[str]:
        return [] if self.model.cuda_graphs else ["it runs without CUDA graphs because capturing one failed"]

    def universal(self, visual: Tensor) -> Tensor:
        return self.model.visual_norm(visual + self.model.universal(visual))

    def captioning(self, video: Tensor) -> Tensor:
        return self.model.predict("captioning", video, **self.generation).scores[:, 0]

    def decode(self, embeds: Tensor) -> Tensor:
        return self.model.predict("captioning", image_embeds=embeds, **self.generation).scores[:, 0]

    def answering(self, video: Tensor, question: Tensor, mask: Tensor) -> Tensor:
        asked = {"question_ids": question, "question_mask": mask}
        return self.model.predict("question_answering", video, **asked, **self.generation).scores[:, 0]

    def ranking(self, video: Tensor, question: Tensor, mask: Tensor, answers: Tensor, answers_mask: Tensor) -> Tensor:
        texts = {"question_ids": question, "question_mask": mask, "answer_ids": answers, "answer_mask": answers_mask}
        return in_order(*self.model.predict("answer_ranking", video, **texts, k=len(answers)))

    def grounding(self, video: Tensor, phrase: Tensor, mask: Tensor) -> Tensor:
        return self.model.predict("grounding", video, text_ids=phrase, text_mask=mask).logits[:, 0]

    def retrieval_features(self, video: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        visual = self.model.visual_features(self.model.encode_video(video))
        return torch.cat([visual, SPACES["contrast"].features(self.model, texts, mask)])

    def re_ranking(self, embeds: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        everything = torch.ones(len(embeds), len(states), dtype=torch.bool, device=embeds.device)
        return match_pairs(self.model, lambda row: embeds[row : row + 1], states, mask, everything)


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

    def ranking(self, video: Tensor, question: Tensor, mask: Tensor, answers: Tensor, answers_mask: Tensor) -> Tensor:
        return self.peer.rank(*self.peer.encode_question(video, question, mask), answers)

    def grounding(self, video: Tensor, phrase: Tensor, mask: Tensor) -> Tensor:
        return self.peer.ground(*self.peer.encode_question(video, phrase, mask))[:, 0]

    def retrieval_features(self, video: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        longest = int(mask.sum(dim=1).max())  # the official code pads further
        return torch.cat(self.peer.retrieval_features(video, texts[:, :longest], mask[:, :longest]))

    def re_ranking(self, embeds: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        return self.peer.match(embeds, states, mask)

    def loss(self, *inputs: Tensor) -> Tensor:
        if self.answers:
            return self.peer.answer_loss(*inputs[:4])
        return self.peer.loss(*inputs[:2])

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        peer = self.peer
        layers = peer.vision_block, peer.bert_layer
        peer.vision_block, peer.bert_layer = (partial(checkpoint, layer, use_reentrant=False) for layer in layers)
        try:
            yield
        finally:
            peer.vision_block, peer.bert_layer = layers


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
        stacks = (text.text_encoder_layers, getattr(text, "num_uni_layer", 0), text.fusion_layers)
        bert_layers = sum(stacks) + text.text_decode_layers  # answers that are ranked pass the decoder as whole texts
        torch._inductor.config.freezing = True
        torch._dynamo.config.recompile_limit = 1 + max(self.config.vision.layers, bert_layers)
        super().prepare()


IMPLEMENTATIONS: dict[str, type[Implementation]] = {
    "reference": Reference,
    "accelerated": Accelerated,
    "fast": Fast,
    "eager": Eager,
    "compiled": Compiled,
    "frozen": Frozen,
}


def implementation(name: str, config: Any) -> type[Implementation]:
    """The implementation of that name for a configuration's family of models."""
    return MPlugReference if (name, config.family) == ("reference", "mplug") else IMPLEMENTATIONS[name]
