"""One step of decoding with filled caches: all decoder layers, the word scores, the best beams, caches reordered."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bench import flops
from bench.case import OURS, Agreement, Call, Case, agreement
from bench.modules.forms import BACKENDS, compiling, config_of
from bench.peer import Peer, logits
from bench.row import Key
from bench.weights import allocate
from mplug2_fast import MPlug2Config
from mplug2_fast.models.config import CLS_TOKEN_ID, SEP_TOKEN_ID
from mplug2_fast.models.mplug2 import MPlug2ForCaptioning
from mplug2_fast.ops import beam_attention, beam_step, explain
from mplug2_fast.ops.runtime.spec import NOISE_FLOOR, normal
from mplug2_fast.reference import MPlug2ForCaptioning as ReferenceForCaptioning

BEAMS, STEPS, STEP = 5, 15, 7
"""The middle one of fifteen steps: eight tokens, one of them new."""


class Given:
    """What every implementation starts from.

    Attributes:
        memory: `(1, S, D)`, float32. sequences: `(1, BEAMS, STEP + 1)`, all different. cumulative: `(1, BEAMS)`.
    """

    def __init__(self, config: MPlug2Config, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = flops.visual_tokens(config, config.vision.num_frames)
        self.memory = normal(generator, 1, tokens, config.text.hidden_size).to(device)
        words = torch.randint(103, config.text.vocab_size, (1, BEAMS, STEP + 1), generator=generator)
        words[:, :, 0] = CLS_TOKEN_ID
        self.sequences = words.to(device)
        self.cumulative = torch.linspace(-4, -8, BEAMS, device=device)[None]


class Step:
    """An implementation.

    Attributes:
        replays: whether `run` already replays a CUDA graph.
    """

    replays = False

    def before(self) -> tuple[()]:
        """Restores the caches."""
        return ()

    def logits(self) -> Tensor:
        """Of the newest tokens, `(1, BEAMS, vocabulary)`."""
        raise NotImplementedError

    def best(self, logits: Tensor) -> Tensor:
        """The scores of the best beams, `(1, BEAMS)`; caches are reordered."""
        raise NotImplementedError

    def run(self) -> Tensor:
        return self.best(self.logits())


class Ours(Step):
    def __init__(self, config: MPlug2Config, device: str, dtype: torch.dtype) -> None:
        self.model = MPlug2ForCaptioning(config, device="meta", dtype=dtype).eval()
        allocate(self.model, device, "decoder")
        self.decoder, self.given = self.model.decoder, Given(config, device)
        self.memory = self.decoder.remember(self.given.memory.to(dtype))
        self.cache = self.decoder.new_cache(1, BEAMS, STEPS)
        for step in range(STEP):
            self.decoder.step(self.given.sequences[:, :, step], step, self.cache, self.memory)
        self.cached = [value for value in vars(self.cache).values() if isinstance(value, Tensor)]
        self.filled = [value.clone() for value in self.cached]

    def before(self) -> tuple[()]:
        for value, filled in zip(self.cached, self.filled, strict=True):
            value.copy_(filled)
        return ()

    def logits(self) -> Tensor:
        return self.decoder.step(self.given.sequences[:, :, STEP], STEP, self.cache, self.memory)

    def best(self, logits: Tensor) -> Tensor:
        scores, _, origin, _ = beam_step(
            logits, self.given.cumulative, step=STEP, min_length=STEPS, end_token_id=SEP_TOKEN_ID
        )
        self.cache.reorder(origin.flatten(), STEP + 1)
        return scores

    def backend(self) -> str:
        keys, values = self.memory.keys_values[0]
        query = keys.new_empty(1, BEAMS, keys.shape[1], keys.shape[-1])
        served = explain(beam_attention, query, keys, values).chosen or ""
        return BACKENDS.get(served, served)


class Official(Step):
    """The whole prefix once more, with the memory tiled over the beams."""

    def __init__(self, config: MPlug2Config, device: str, dtype: torch.dtype) -> None:
        model = ReferenceForCaptioning(config, device="meta", dtype=dtype).eval()
        allocate(model, device, "text_decoder")
        self.decoder, self.given = model.text_decoder, Given(config, device)
        self.memory = self.given.memory.to(dtype)

    def logits(self) -> Tensor:
        sequences, tiled = self.given.sequences[0], self.memory.repeat_interleave(BEAMS, dim=0)
        return self.decoder(sequences, torch.ones_like(sequences), tiled, None)[None, :, -1]

    def best(self, logits: Tensor) -> Tensor:
        return beam_step.op.spec.reference(logits, self.given.cumulative, STEP, STEPS, SEP_TOKEN_ID)[0]


class OfPeer(Step):
    def __init__(self, config: MPlug2Config, device: str, dtype: torch.dtype, *, compile: bool = False) -> None:
        model = MPlug2ForCaptioning(config, device="meta", dtype=dtype).eval()
        allocate(model, device, "decoder")
        self.peer, self.given = Peer(model), Given(config, device)
        self.replays = compile and device != "cpu"
        self.origin = torch.arange(BEAMS, device=device)
        self.steps = torch.arange(STEPS, device=device)
        self.penalties = ((6.0 + self.steps) / 6.0) ** 0.6
        self.end_bias = torch.tensor(-1e20, device=device)
        self.peer.start(self.given.memory.to(dtype), BEAMS, STEPS)
        for step in range(STEP):
            self.at(step)
        if compile:
            self.peer.compile(torch.device(device).type)
            with compiling(freeze=device == "cpu", graphs=config.text.text_decode_layers):
                self.run()

    def at(self, step: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        tokens, at = self.given.sequences[:, :, step], self.steps[step : step + 1]
        return self.peer.step(
            tokens, at, self.origin, None, self.given.cumulative, self.penalties[step], self.end_bias
        )[0]

    def run(self) -> Tensor:
        return self.at(STEP)

    def logits(self) -> Tensor:
        tokens, at = self.given.sequences[:, :, STEP], self.steps[STEP : STEP + 1]
        return logits(self.peer.model.decoder, self.peer.states(tokens, at, self.origin, None))


def logits_and_scores(step: Step) -> tuple[Tensor, Tensor]:
    """The logits of the words, `(1, BEAMS, vocabulary)`, and the scores of the best beams."""
    step.before()
    words = step.logits()
    step.before()
    return words, step.run()


def flop(config: MPlug2Config) -> int:
    """FLOP of one more step."""
    memory = flops.visual_tokens(config, config.vision.num_frames)
    after, before = (flops.decoding(config, memory, BEAMS, steps) for steps in (STEP + 1, STEP))
    return after - before


def needed_bytes(model: MPlug2ForCaptioning, element: int) -> int:
    """Bytes of one more step, in elements of `element` bytes."""
    memory = flops.visual_tokens(model.config, model.config.vision.num_frames)
    after, before = (flops.decoding_bytes(model, element, memory, BEAMS, steps, 1) for steps in (STEP + 1, STEP))
    return after - before


@torch.no_grad()
def build(key: Key, *, compile: bool) -> Case:
    config, dtype = config_of(key), getattr(torch, key.dtype)
    kinds = {
        OURS: lambda: Ours(config, key.device, dtype),
        "reference": lambda: Official(config, key.device, torch.float32),
        "eager": lambda: OfPeer(config, key.device, dtype),
    }
    if compile:
        kinds["compiled"] = lambda: OfPeer(config, key.device, dtype, compile=True)

    @functools.cache
    @torch.no_grad()
    def step(way: str) -> Step:
        return kinds[way]()

    @torch.no_grad()
    def agree() -> Agreement:
        ours, exact, eager = (logits_and_scores(step(way)) for way in (OURS, "reference", "eager"))
        return agreement(ours, exact, eager, NOISE_FLOOR[dtype])

    def calls(way: str) -> list[Call]:
        return [Call(torch.no_grad()(step(way).run), step(way).before, step(way).replays)]

    ours = step(OURS)
    return Case(
        key=key,
        ways={way: functools.partial(calls, way) for way in kinds},
        flop=flop(config),
        bytes=needed_bytes(ours.model, dtype.itemsize),
        agreement=agree,
        backend=ours.backend(),
    )
