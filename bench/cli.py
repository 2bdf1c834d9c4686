"""Measures speed against the official algorithm, eager PyTorch, torch.compile and other installed packages.

    python bench/run.py                                     # everything at Base sizes: minutes on a CPU
    python bench/run.py --quick                             # everything, small: under two minutes
    python bench/run.py --level ops --only attention,mlp --sizes large --direction forward,backward --dtype bfloat16
    python bench/run.py --level model --preset large --dtype bfloat16,float32 --json large.json
    python bench/run.py --model mplug --preset large        # answers, captions, boxes, retrieval of one image
    python bench/run.py --level train --dtype float32,bfloat16            # a step of captioning and of answering
    python bench/run.py --quick --compare old.json --fail-if-slower 10%
    python bench/run.py --waterfall --preset large          # from the official algorithm to ours, a technique per row
    python bench/run.py --scaling --preset large            # time and memory by frames, batch, resolution and beams

Ratios compare runs that took turns. Results are checked, and wrong ones are marked. The exit status is 1 if a result is
wrong, a row could not be measured, or --fail-if-slower found a regression, and 2 for invalid options.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import ceilings, compare, inputs, measure, packages, plots, runner, scaling, table, waterfall
from bench.clock import MODES, Budget
from bench.flops import MODEL_TASKS
from bench.plan import BASELINES, LOADER, TASKS, TRAIN, Plan
from bench.process import ProcessError
from bench.progress import Progress, TerminalProgress
from bench.row import COMPARED, DIRECTIONS, FP8, INT8, LEVELS, SIZES, Key, Results, Row, Selection, on_roofline
from bench.runner import Settings
from bench.video import cases as video
from mplug2_fast.devices import DTYPES, pick_device
from mplug2_fast.errors import MPlug2Error
from mplug2_fast.models import FAMILIES
from mplug2_fast.tasks.grounding import BINS, FIRST_BIN

QUICK = Budget(seconds=0.12, most=100, fewest=3, slow=1.0)
QUICK_PROCESSES = {"ops": 5, "modules": 2, "video": 2}
QUICK_MORE = {"beam_step": 11}
QUICK_COMPILED = frozenset({"local_temporal"})
"""The one operator that --quick compiles. Compiling takes most of its time."""
QUICK_TASKS = {"model": ("captioning", "features"), "train": ("captioning step", LOADER)}


WHOLE = {"model": TASKS, "train": TRAIN}
"""The tasks of the levels that run whole models, one process per implementation."""


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        check(options, parser)
        check_named(options)
        with TerminalProgress() as progress:
            return run(options, progress)
    except (MPlug2Error, ProcessError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what").add_argument
    add("--level", type=names(LEVELS), default=LEVELS, help=f"{', '.join(LEVELS)} (default: all)")
    add("--only", type=names(), default=(), help="names of operators, modules and tasks (default: all)")
    add(
        "--model",
        choices=tuple(MODEL_TASKS),
        default="mplug2",
        help="family of models (default: mplug2; mplug has the level model, on one image)",
    )
    add("--preset", choices=("tiny", "base", "large"), help="size of modules and models (default: base; --quick: tiny)")
    add("--sizes", type=names(SIZES), help=f"sizes of operators: {', '.join(SIZES)} (default: the preset's)")
    dtypes = (*DTYPES, INT8, FP8)
    add(
        "--dtype",
        type=names(dtypes),
        default=("float32",),
        help=f"{', '.join(dtypes)}, the last two for whole models on a CPU and on a GPU (default: float32)",
    )
    add("--direction", type=names(DIRECTIONS), default=("forward",), help=f"{', '.join(DIRECTIONS)} (default: forward)")
    add("--quick", action="store_true", help="small sizes, few repeats")
    add("--waterfall", action="store_true", help="measure one technique after another instead")
    add("--scaling", action="store_true", help="measure growth with each size instead: writes a chart, CSV and JSON")
    add(
        "--accelerate",
        action="store_true",
        help="measure the reference before and after mplug2_fast.accelerate instead",
    )

    add = parser.add_argument_group("how").add_argument
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=int, help="CPU threads (default: all cores; 1 for the tiny model)")
    add(
        "--mode",
        choices=MODES,
        default="cold",
        help="operators and modules: inputs outside the cache, in the cache, or a CUDA graph (default: cold)",
    )
    add(
        "--baselines",
        type=names(COMPARED),
        default=COMPARED,
        help=f"{', '.join(COMPARED)} (default: all available; without compiled a run is several times faster)",
    )
    add(
        "--no-freeze",
        action="store_true",
        help="do not pack the compiled peer's weights: on a CPU this compiles faster and runs slower (--quick does so)",
    )
    add("--no-memory", action="store_true", help="skip the peak memory of operators and modules")
    add("--repeats", type=int, help="timed runs of a model (default: 5; --quick: 9; --scaling: 3)")

    add = parser.add_argument_group("sizes of the model's work").add_argument
    add("--frames", type=int, help="frames of the video (default: the preset's)")
    add("--beams", type=int, default=5, help="beams of the search (default: 5)")
    add(
        "--steps",
        type=int,
        help="decoding steps, all of which run; tokens that training learns (default: 15; mplug: 10)",
    )
    add("--batch", type=int, default=1, help="copies of the video (default: 1)")
    add("--reference-steps", type=int, metavar="N", help="time the reference at N steps; the notes say so")
    add("--video", type=Path, help="a file, or .npy of uint8 frames (default: a bundled clip)")

    add = parser.add_argument_group("results").add_argument
    add("--json", type=Path, metavar="FILE", help="write the results here")
    add("--csv", type=Path, metavar="FILE", help="also write them here")
    add("--pictures", type=Path, metavar="FOLDER", help="draw the roofline or the waterfall here")
    add("--output", type=Path, metavar="FOLDER", default=Path(), help="folder for --scaling (default: here)")
    add("--compare", type=Path, metavar="OLD", help="print what changed since these results")
    add(
        "--fail-if-slower",
        type=limit,
        metavar="PERCENT",
        help="exit with 1 if a row became slower by more, relative to its baselines. It is measured again first",
    )
    return parser


def names(known: tuple[str, ...] | None = None):
    """A parser of NAME[,NAME]."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(text.split(",")))
        for name in chosen:
            if known is not None and name not in known:
                raise argparse.ArgumentTypeError(f"no such choice {name!r}: choose from {', '.join(known)}")
        return chosen

    return parse


def limit(text: str) -> float:
    try:
        return compare.parse_limit(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fills in defaults. Exits with status 2 if options are invalid."""
    options.preset = options.preset or ("tiny" if options.quick else "base")
    options.sizes = options.sizes or ("quick" if options.quick or options.preset == "tiny" else options.preset,)
    config = FAMILIES[options.model].config.preset(options.preset)
    images = options.model == "mplug"
    if images:
        if options.waterfall or options.scaling or options.accelerate or options.level not in (LEVELS, ("model",)):
            parser.error("--model mplug measures only --level model")
        options.level = ("model",)
    if options.frames is None:
        options.frames = 1 if images else config.vision.num_frames
    options.steps = (10 if images else 15) if options.steps is None else options.steps
    options.repeats = options.repeats or (3 if options.scaling else 9 if options.quick else 5)
    options.reference_steps = options.reference_steps or options.steps
    for name in ("frames", "beams", "batch", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if not 1 <= options.steps <= config.text.max_position_embeddings:
        parser.error(f"--steps must be from 1 to {config.text.max_position_embeddings}, got {options.steps}")
    if not 1 <= options.reference_steps <= options.steps:
        parser.error(
            f"--reference-steps must be from 1 to the {options.steps} of --steps, got {options.reference_steps}"
        )
    if INT8 in options.dtype and (options.level != ("model",) or options.device != "cpu" or options.accelerate):
        parser.error("--dtype int8 is for whole models on a CPU: add --level model")
    if FP8 in options.dtype and (options.level != ("model",) or options.device == "cpu" or options.accelerate):
        parser.error("--dtype fp8 is for whole models on a GPU: add --level model --device cuda")
    options.device = str(pick_device(options.device))
    if options.mode == "graph" and options.device == "cpu":
        parser.error("--mode graph needs --device cuda")
    if options.waterfall + options.scaling + options.accelerate > 1:
        parser.error("choose one of --waterfall, --scaling and --accelerate")
    if (options.scaling or options.pictures) and not plots.available():
        parser.error("pictures need matplotlib: pip install matplotlib")
    if options.fail_if_slower is not None and options.compare is None:
        parser.error("--fail-if-slower needs results to compare with: --compare OLD")


def check_named(options: argparse.Namespace) -> None:
    """Checks names, files and folders before anything is measured, which takes minutes.

    Raises:
        VideoError: --video cannot be read.
        ValueError: no measured level has a name of --only.
        FileNotFoundError: a folder to write to does not exist.
    """
    levels = levels_of(options)
    known = [name for level in levels for name in names_of(level, options)]
    unknown = [name for name in options.only if name not in known]
    if unknown:
        raise ValueError(f"no such name in {', '.join(levels)}: {', '.join(unknown)}; choose from {', '.join(known)}")
    files = [path.parent for path in (options.json, options.csv) if path]
    for folder in (*files, *filter(None, [options.pictures])):
        if not folder.is_dir():
            raise FileNotFoundError(f"folder {folder} does not exist: create it first")
    if options.video:
        config = FAMILIES[options.model].config.preset(options.preset)
        inputs.load(options.video, options.frames, config.vision.image_size)


def run(options: argparse.Namespace, progress: Progress) -> int:
    if options.scaling:
        print(*scaling.run(plan(options, scaling.Sweep), options.output, progress), sep="\n")
        return 0
    if options.waterfall:
        return run_waterfall(options, progress)
    old = Results.read(options.compare) if options.compare else None
    results = measure_levels(options, progress)
    table.show(results)
    if options.json:
        results.write(options.json)
    if options.csv:
        table.write_csv(results, options.csv)
    if options.pictures and on_roofline(results.rows):
        plots.roofline(results, options.pictures / "roofline.png")
    slower = against(old, results, options, progress) if old else 0
    for what, why in results.failed.items():
        print(f"error: {what}: {why}", file=sys.stderr)
    wrong = [row for row in results.rows if not row.correct]
    for row in wrong:
        print(f"error: {row.key} is wrong: {table.error(row)}: {row.command}", file=sys.stderr)
    return 1 if wrong or results.failed or slower else 0


def run_waterfall(options: argparse.Namespace, progress: Progress) -> int:
    found = waterfall.run(plan(options), progress)
    waterfall.show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.pictures:
        plots.waterfall(found, options.pictures / "waterfall.png")
    wrong = waterfall.wrong(found)
    for technique in wrong:
        print(f"error: the result with {technique} is wrong", file=sys.stderr)
    return 1 if wrong else 0


def against(old: Results, new: Results, options: argparse.Namespace, progress: Progress) -> int:
    """Prints what changed. Returns the number of regressions for --fail-if-slower."""
    if options.fail_if_slower is None:
        compare.show(compare.compare(old, new))
        return 0
    found = compare.gate(old, new, options.fail_if_slower, lambda key: again(key, options, progress, new.ceilings))
    compare.show(found, options.fail_if_slower)
    regressions = compare.regressions(found, options.fail_if_slower)
    for regression in regressions:
        print(f"error: {regression}", file=sys.stderr)
    return len(regressions)


def measure_levels(options: argparse.Namespace, progress: Progress) -> Results:
    """Measures all chosen levels as one run."""
    works = {level: works_of(level, options) for level in levels_of(options)}
    if not any(works.values()):
        raise ValueError(" ".join([f"these options leave nothing to measure in {', '.join(works)}", *video.notes()]))

    dtypes = list(options.dtype)
    eight_bit = INT8 if options.device == "cpu" else FP8
    if any(ceilings.dtype_of(key) == eight_bit for key in works.get("ops", ())):
        dtypes = list(dict.fromkeys([*dtypes, eight_bit]))

    def ceilings_now() -> dict[str, Any]:
        return runner.measure_ceilings(options.device, dtypes, settings(options, "ops"), progress)

    best, parts = ceilings_now(), []
    for level, wanted in works.items():
        if wanted and level in WHOLE:
            parts.append(measure.run(plan(options, tasks=wanted), progress, best))
        elif wanted:
            parts.append(runner.run(wanted, settings(options, level), progress, best))
            parts[-1].notes += packages.reasons(wanted)
    if "video" in works:
        parts[-1].notes += video.notes()
    return together(parts, ceilings.merge(best, ceilings_now()))


def levels_of(options: argparse.Namespace) -> tuple[str, ...]:
    return ("model",) if options.accelerate else options.level


def names_of(level: str, options: argparse.Namespace) -> tuple[str, ...]:
    """The names that --only accepts in a level."""
    if level == "model":
        return MODEL_TASKS[options.model]
    return WHOLE[level] if level in WHOLE else importlib.import_module(f"bench.{level}.cases").NAMES


def works_of(level: str, options: argparse.Namespace) -> tuple[Any, ...]:
    """Keys; names of tasks at the levels that run whole models."""
    if level not in WHOLE:
        return tuple(keys(level, options))
    known = names_of(level, options)
    chosen = ("captioning",) if options.accelerate else QUICK_TASKS[level] if options.quick else known
    wanted = (task for task in known if task in (options.only or chosen))
    return tuple(task for task in wanted if not _lacks_clip(task, options) and not _lacks_places(task, options))


def _lacks_places(task: str, options: argparse.Namespace) -> bool:
    """Whether the vocabulary of the model, a tiny one, has no tokens for the places of boxes."""
    vocabulary = FAMILIES[options.model].config.preset(options.preset).text.vocab_size
    return task == "grounding" and vocabulary < FIRST_BIN + BINS


def _lacks_clip(task: str, options: argparse.Namespace) -> bool:
    """Whether the data loader has no video file to read."""
    return task == LOADER and (not inputs.has_decoder() or (options.video or inputs.DEFAULT_VIDEO).suffix == ".npy")


def together(parts: list[Results], best: dict[str, Any]) -> Results:
    """Joins several levels into one run under the same ceilings."""
    whole = parts[0]
    for part in parts[1:]:
        whole.rows += part.rows
        whole.failed |= part.failed
        whole.notes += part.notes
    return replace(whole, ceilings=best, rows=[ceilings.under(row, best) for row in whole.rows])


def keys(level: str, options: argparse.Namespace) -> list[Key]:
    selection = Selection(
        options.preset,
        options.dtype,
        options.device,
        options.direction,
        options.sizes,
        options.only,
        options.quick,
    )
    return importlib.import_module(f"bench.{level}.cases").keys(selection)


def settings(options: argparse.Namespace, level: str) -> Settings:
    many = options.quick and options.device == "cpu"
    return Settings(
        threads=options.threads or default_threads(level, options.preset),
        baselines=options.baselines,
        compiled=QUICK_COMPILED if options.quick else None,
        mode=options.mode,
        budget=QUICK if options.quick else Budget(),
        processes=QUICK_PROCESSES.get(level, 1) if many else 1,
        more=QUICK_MORE if many else {},
        memory=not options.no_memory,
        quick=options.quick,
        apart=options.device == "cpu",
    )


def again(key: Key, options: argparse.Namespace, progress: Progress, best: dict[str, Any]) -> Row:
    """Measures the row of a key again."""
    if key.level in WHOLE:
        chosen = argparse.Namespace(**{**vars(options), "dtype": (key.dtype,)})
        results = measure.run(plan(chosen, tasks=(key.name.removesuffix(", accelerated"),)), progress, best)
    else:
        results = runner.run([key], settings(options, key.level), progress, best)
    return results[key]


def plan(options: argparse.Namespace, kind: type[Plan] = Plan, tasks: tuple[str, ...] = ("captioning",)) -> Plan:
    sizes = ("frames", "beams", "steps", "batch", "repeats", "reference_steps")
    return kind(
        model=options.model,
        preset=options.preset,
        dtypes=options.dtype,
        device=options.device,
        tasks=tasks,
        **{name: getattr(options, name) for name in sizes},
        threads=options.threads or default_threads("model", options.preset),
        baselines=("reference",) if options.accelerate else tuple(b for b in BASELINES if b in options.baselines),
        freeze=options.device == "cpu" and not (options.quick or options.no_freeze),
        compiled_tasks=() if options.quick else (*MODEL_TASKS[options.model], *TRAIN),
        quick=options.quick,
        accelerate=options.accelerate,
        video=options.video,
    )


def default_threads(level: str, preset: str) -> int:
    """All cores; one for the tiny model, which has no work for more."""
    return 1 if preset == "tiny" and level != "ops" else torch.get_num_threads()
