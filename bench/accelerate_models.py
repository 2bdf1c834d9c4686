"""Times models of other packages before and after `mplug2_fast.accelerate`.

    python -m bench.accelerate_models                                # all, float32, one thread
    python -m bench.accelerate_models --dtype bfloat16 bert blip     # those whose names start so
    python -m bench.accelerate_models --dtype int8 vit               # 8-bit weights
    python -m bench.accelerate_models --seconds 20 "timm ViT-Ti"     # longer

Models are the packages' own classes with random weights. Three copies of a model take turns: the original, the
accelerated one, and the original again. The last pair shows the scatter. Times are CPU times, so other processes hardly
count. With int8, the models are bfloat16 if the processor multiplies it, and a float32 copy takes a turn too. Results
are checked. The exit status is 1 if one is wrong or a model became slower by more than the scatter.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import math
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mplug2_fast as mf
from bench import case, machine
from mplug2_fast.checkpoint.eight_bit import others_dtype
from mplug2_fast.devices import DTYPES, INT8

WIDTHS, LAYERS, IMAGE, PATCH, NEW_TOKENS = (192, 384, 768), 4, 224, 16, 16
"""Sizes of the models of transformers."""
SERVED, SMALL, PRODUCTS = "served", "too small to gain", "8-bit products"
TOLERANCE, INT8_TOLERANCE = 2e-5, 3e-2
"""Relative error allowed in float32, and with 8-bit weights. In other types the error may be twice that of the
original."""
FEWEST_TURNS, MOST_TURNS = 9, 400


class Work(NamedTuple):
    """A model and a call of it.

    Attributes:
        run: called with a model and the inputs, returns tensors to compare.
        generates: whether these are the logits of each step.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    run: Callable[..., Sequence[Tensor]]
    generates: bool = False


@dataclass(frozen=True)
class Subject:
    name: str
    package: str
    make: Callable[[], Work]


@dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
        seconds: CPU seconds turn by turn: for the original, the accelerated model, the original again, and with int8
            the original in float32.
        calls: of accelerated modules in one run, by what became of them.
    """

    name: str
    seconds: tuple[tuple[float, ...], ...]
    calls: Counter[str]
    error: float
    allowed: float

    @property
    def ratio(self) -> float:
        """How many times faster the accelerated model is."""
        return statistics.median(original / fast for original, fast, *_ in self.seconds)

    @property
    def ratio_to_float32(self) -> float | None:
        """How many times faster it is than the original in float32, if that was measured."""
        ratios = [turn[3] / turn[1] for turn in self.seconds if len(turn) > 3]
        return statistics.median(ratios) if ratios else None

    @property
    def null(self) -> tuple[float, float]:
        """(the ratio of the two originals, half the width of its 95% interval)."""
        ratios = sorted(original / again for original, _, again, *_ in self.seconds)
        outside = max(0, math.floor(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios))))
        return statistics.median(ratios), (ratios[-1 - outside] - ratios[outside]) / 2

    @property
    def is_slower(self) -> bool:
        """Whether it is slower by more than the scatter of the originals."""
        middle, half = self.null
        return self.ratio < 1 - abs(middle - 1) - half

    @property
    def is_right(self) -> bool:
        return self.error <= self.allowed


# --- models


def pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def words(batch: int, tokens: int) -> dict[str, Tensor]:
    """Tokens, and a mask that hides the last quarter of the last row if there are several rows."""
    ids = torch.randint(1000, 2000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, -(tokens // 4) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def sizes(width: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }


def vision(width: int) -> dict[str, int]:
    return {**sizes(width), "image_size": IMAGE, "patch_size": PATCH}


def of_transformers(model: str, config: str, inputs: dict[str, Tensor], *outputs: str, **options: Any) -> Work:
    """A model of transformers that returns these outputs, or generates if none is given."""
    package = importlib.import_module("transformers")

    def run(model: Any, **inputs: Tensor) -> Sequence[Tensor]:
        return [getattr(found, name) for found in [model(**inputs)] for name in outputs]

    def generate(model: Any, **inputs: Tensor) -> Sequence[Tensor]:
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        found = model.generate(**inputs, **length, do_sample=False, return_dict_in_generate=True, output_logits=True)
        return found.logits

    made = getattr(package, model)(getattr(package, config)(**options))
    return Work(made, inputs, run if outputs else generate, generates=not outputs)


def bert(width: int) -> Work:
    return of_transformers("BertModel", "BertConfig", words(2, 64), "last_hidden_state", **sizes(width))


def bert_lm(width: int) -> Work:
    return of_transformers("BertLMHeadModel", "BertConfig", words(1, 8), is_decoder=True, **sizes(width))


def vit(width: int) -> Work:
    image = {"pixel_values": pixels(1, 3, IMAGE, IMAGE)}
    return of_transformers("ViTModel", "ViTConfig", image, "last_hidden_state", **vision(width))


def clip(width: int) -> Work:
    inputs = {**words(2, 16), "pixel_values": pixels(1, 3, IMAGE, IMAGE)}
    towers = {"text_config": sizes(width), "vision_config": vision(width), "projection_dim": width}
    return of_transformers("CLIPModel", "CLIPConfig", inputs, "image_embeds", "text_embeds", **towers)


def blip(width: int) -> Work:
    towers = {"text_config": {**sizes(width), "encoder_hidden_size": width}, "vision_config": vision(width)}
    image = {"pixel_values": pixels(1, 3, IMAGE, IMAGE)}
    return of_transformers("BlipForConditionalGeneration", "BlipConfig", image, **towers)


def git(width: int) -> Work:
    inputs = {**words(1, 4), "pixel_values": pixels(1, 3, IMAGE, IMAGE)}
    return of_transformers("GitForCausalLM", "GitConfig", inputs, vision_config=vision(width), **sizes(width))


def videomae(width: int) -> Work:
    video = {"pixel_values": pixels(1, 8, 3, IMAGE, IMAGE)}
    return of_transformers("VideoMAEModel", "VideoMAEConfig", video, "last_hidden_state", num_frames=8, **vision(width))


def timesformer(width: int) -> Work:
    video = {"pixel_values": pixels(1, 4, 3, IMAGE, IMAGE)}
    return of_transformers(
        "TimesformerModel", "TimesformerConfig", video, "last_hidden_state", num_frames=4, **vision(width)
    )


def timm(name: str) -> Work:
    model = importlib.import_module("timm").create_model(name)
    return Work(model, {"image": pixels(1, 3, IMAGE, IMAGE)}, lambda model, image: [model(image)])


def open_clip(name: str) -> Work:
    inputs = {"image": pixels(1, 3, IMAGE, IMAGE), "text": words(1, 77)["input_ids"]}
    return Work(
        importlib.import_module("open_clip").create_model(name),
        inputs,
        lambda model, image, text: [model.encode_image(image), model.encode_text(text)],
    )


def subjects() -> Iterator[Subject]:
    """All models, in the order of the table."""
    known = {
        "BERT with padding": bert,
        "BERT-LM generates": bert_lm,
        "ViT": vit,
        "CLIP": clip,
        "BLIP generates": blip,
        "GIT generates": git,
        "VideoMAE": videomae,
        "TimeSformer": timesformer,
    }
    for name, make in known.items():
        for width in WIDTHS:
            yield Subject(f"{name}, {width}", "transformers", partial(make, width))
    for name, variant in {"timm ViT-Ti": "vit_tiny_patch16_224", "timm ViT-S": "vit_small_patch16_224"}.items():
        yield Subject(name, "timm", partial(timm, variant))
    for name in ("ViT-S-32", "ViT-B-32"):
        yield Subject(f"open_clip {name}", "open_clip", partial(open_clip, name))


# --- measuring


def measure(subject: Subject, dtype: str, seconds: float) -> Result:
    """Measures one model for about this many seconds, on the CPU."""
    rounds = dtype == INT8
    chosen = others_dtype() if rounds else DTYPES[dtype]
    torch.manual_seed(0)
    exact, inputs, run, generates = subject.make()
    exact.eval()
    narrow = {name: value.to(chosen) if value.is_floating_point() else value for name, value in inputs.items()}
    original, fast, again = (copy.deepcopy(exact).to(chosen) for _ in range(3))
    report = mf.accelerate(fast, INT8 if rounds else None)
    work = partial(run, **narrow)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*The original code runs")
        expected = run(exact, **inputs)
        error, usual = (_error(work(model), expected, generates) for model in (fast, original))
        before = _calls(report)
        work(fast)
        calls = {kind: count - before[kind] for kind, count in _calls(report).items()}
        runs = [partial(work, model) for model in (original, fast, again)]
        turns = _turns([*runs, *[partial(run, exact, **inputs)] * rounds], seconds)
    allowed = INT8_TOLERANCE if rounds else TOLERANCE if chosen is torch.float32 else 2 * usual
    return Result(subject.name, turns, Counter(calls), error, allowed)


def _calls(report: mf.acceleration.Report) -> Counter[str]:
    """How many calls were served, were too small, or were left to the original code, by reason; and 8-bit products."""
    found: Counter[str] = Counter()
    for calls in report.calls.values():
        found.update({SERVED: calls.served, SMALL: calls.no_gain, PRODUCTS: calls.int8})
        found.update(calls.by_parts + calls.original)
    return found


def _error(found: Sequence[Tensor], exact: Sequence[Tensor], generates: bool) -> float:
    """The relative error. After the first step with another token, the steps of a generation have different inputs."""
    steps = len(exact)
    if generates:
        same = [torch.equal(f.argmax(-1), e.argmax(-1)) for f, e in zip(found, exact, strict=True)]
        steps = (*same, False).index(False) + 1
    return case.relative_error(tuple(found[:steps]), tuple(exact[:steps]))


def _turns(runs: Sequence[Callable[[], Any]], seconds: float) -> tuple[tuple[float, ...], ...]:
    """CPU seconds of each model, turn by turn. Every turn starts with another model."""
    for run in runs:
        run()
    turns: list[tuple[float, ...]] = []
    begin = time.perf_counter()
    while len(turns) < MOST_TURNS and (len(turns) < FEWEST_TURNS or time.perf_counter() - begin < seconds):
        taken = [0.0] * len(runs)
        for place in range(len(runs)):
            chosen = (place + len(turns)) % len(runs)
            start = time.process_time()
            runs[chosen]()
            taken[chosen] = time.process_time() - start
        turns.append(tuple(taken))
    return tuple(turns)


# --- the table

HEADER = (
    "| model | original, ms | accelerated | original again | calls: served, no gain, other |",
    "| :--- | ---: | ---: | ---: | ---: |",
)
INT8_HEADER = (
    "| model | original, ms | accelerated | original again | than float32 | 8-bit products | error |",
    "| :--- | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def line(result: Result) -> str:
    middle, half = result.null
    verdict = ("" if result.is_right else f" wrong: {result.error:.1e}") + (" slower" if result.is_slower else "")
    original = 1e3 * statistics.median(turn[0] for turn in result.seconds)
    served, small = result.calls[SERVED], result.calls[SMALL]
    last = f"{served}, {small}, {result.calls.total() - served - small - result.calls[PRODUCTS]}"
    if result.ratio_to_float32 is not None:
        last = f"{result.ratio_to_float32:.2f}× | {result.calls[PRODUCTS]} | {result.error:.1e}"
    return (
        f"| {result.name} | {original:.{1 if original >= 10 else 2}f} | {result.ratio:.2f}×{verdict} "
        f"| {middle:.3f} ± {half:.3f} | {last} |"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.accelerate_models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings of names (default: all)")
    parser.add_argument("--dtype", choices=(*DTYPES, INT8), default="float32")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each model (default: 6)")
    parser.add_argument("--why", action="store_true", help="also print what became of the calls")
    options = parser.parse_args(arguments)
    names = tuple(name.lower() for name in options.names)
    chosen = [s for s in subjects() if not names or s.name.lower().startswith(names)]
    if not chosen:
        parser.error(f"no model has such a name: choose from {', '.join(s.name for s in subjects())}")
    torch.set_num_threads(1)
    machine.keep_freed_memory()
    described, versions = machine.describe()
    print(f"{machine.words({**described, 'threads': 1}, versions)} · {options.dtype} · {versions['commit']}\n")
    print(*(INT8_HEADER if options.dtype == INT8 else HEADER), sep="\n")
    failed = False
    for subject in chosen:
        if importlib.util.find_spec(subject.package) is None:
            print(f"{subject.name} is left out: pip install {subject.package}", file=sys.stderr)
            continue
        result = measure(subject, options.dtype, options.seconds)
        print(line(result), flush=True)
        if options.why:
            print(*(f"    {count} × {what}" for what, count in result.calls.items() if count), sep="\n")
        failed |= result.is_slower or not result.is_right
    return failed


if __name__ == "__main__":
    sys.exit(main())
