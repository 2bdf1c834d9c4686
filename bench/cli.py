"""Times captioning and its parts: the released algorithm, the fast model, and a compiled peer.

    python bench/run.py                       # the base model: minutes on a CPU
    python bench/run.py --quick               # the tiny model: about a minute, most of it compiling the peer
    python bench/run.py --preset large --dtype float32,bfloat16 --json results.json
    python bench/run.py --accelerate          # instead: the reference before and after mplug2_fast.accelerate
    python bench/run.py --scaling             # instead: charts of the fast model's time and memory against its sizes

Every implementation runs in a process of its own, on the same seeded weights; runs take turns and medians count.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from bench import flops, measure, plots, scaling, table
from bench.plan import Plan
from bench.render import RESULTS
from bench.workers import WorkerError
from mplug2_fast import MPlug2Config
from mplug2_fast.devices import DTYPES, pick_device
from mplug2_fast.errors import MPlug2Error


def parse(arguments: list[str] | None = None) -> tuple[Plan, Path | None]:
    """The plan and the file for JSON, or a `Sweep` and its folder. Exits with status 2 on options that cannot be."""
    parser = argparse.ArgumentParser(
        prog="bench/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=("tiny", "base", "large"), help="sizes of the model (default: base; with --quick tiny)")
    add("--dtype", action="append", metavar="DTYPE[,DTYPE]", help=f"{', '.join(DTYPES)} (default: float32)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--level", action="append", metavar="LEVEL[,LEVEL]", help=f"{', '.join(flops.LEVELS)} (default: all)")
    add("--frames", type=int, help="frames of the video (default: the preset's)")
    add("--beams", type=int, default=5, help="beams of the search (default: 5)")
    add("--steps", type=int, default=15, help="decoding steps, exactly as many are run (default: 15)")
    add("--batch", type=int, default=1, help="copies of the video (default: 1)")
    add(
        "--repeats",
        type=int,
        help="timed runs of each, of which the median counts (default: 5; with --quick 9; with --scaling 3)",
    )
    add(
        "--threads",
        type=int,
        help="of each process, on the CPU (default: all cores; 1 for tiny, which has no work for more)",
    )
    add("--reference-steps", type=int, metavar="N", help="time the reference at N decoding steps; the table says so")
    add("--no-peer", action="store_true", help="leave the compiled peer out")
    add(
        "--peer",
        choices=("frozen", "compiled", "uncompiled"),
        help="frozen packs the weights of every layer into a graph of its own: faster on a CPU, longer to compile; "
        "uncompiled needs no compiler (default: frozen on a CPU; compiled on CUDA and with --quick)",
    )
    add(
        "--accelerate",
        action="store_true",
        help="instead of the fast model and the peer: the reference after mplug2_fast.accelerate",
    )
    add("--quick", action="store_true", help="the tiny model, few repeats")
    add("--video", type=Path, help="input file, or .npy of uint8 frames (default: a bundled clip)")
    add("--json", type=Path, metavar="FILE", help="write the results here")
    add(
        "--scaling",
        action="store_true",
        help="captioning with the fast model against frames, batch, resolution and beams, one varied at a time from "
        "the sizes given: scaling-PRESET-DTYPE.png, .csv and .json; with --quick at fewer points",
    )
    add("--output", type=Path, metavar="FOLDER", default=RESULTS, help="of --scaling (default: bench/results)")
    options = parser.parse_args(arguments)

    def listed(values: list[str] | None, known: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name for value in values or default for name in value.split(",")))
        for name in names:
            if name not in known:
                parser.error(f"no such choice {name!r}: choose from {', '.join(known)}")
        return names

    preset = options.preset or ("tiny" if options.quick else "base")
    config = MPlug2Config.preset(preset)
    repeats = options.repeats or (3 if options.scaling else 9 if options.quick else 5)
    threads = (1 if preset == "tiny" else torch.get_num_threads()) if options.threads is None else options.threads
    reference_steps = options.reference_steps or options.steps
    frames = config.vision.num_frames if options.frames is None else options.frames
    positive = {
        "frames": frames,
        "beams": options.beams,
        "batch": options.batch,
        "repeats": repeats,
        "threads": threads,
    }
    for name, value in positive.items():
        if value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if not 1 <= options.steps <= config.text.max_position_embeddings:
        parser.error(f"--steps must be from 1 to {config.text.max_position_embeddings}, got {options.steps}")
    if not 1 <= reference_steps <= options.steps:
        parser.error(f"--reference-steps must be from 1 to the {options.steps} of --steps, got {reference_steps}")
    device = str(pick_device(options.device))
    peer = options.peer or ("compiled" if options.quick or device != "cpu" else "frozen")
    if peer == "frozen" and device != "cpu":
        parser.error("--peer frozen is for the CPU")
    if options.scaling and (options.json or options.level):
        parser.error("--scaling times captioning and writes to --output: leave --json and --level out")
    if options.accelerate and (options.scaling or options.peer):
        parser.error("--accelerate times the reference before and after: leave --scaling and --peer out")
    if options.scaling and not plots.available():
        parser.error("--scaling draws with matplotlib, which is not installed: pip install matplotlib")
    wanted = listed(options.level, flops.LEVELS, flops.LEVELS)
    plan = (scaling.Sweep if options.scaling else Plan)(
        preset=preset,
        dtypes=listed(options.dtype, tuple(DTYPES), ("float32",)),
        device=device,
        levels=tuple(level for level in flops.LEVELS if level in wanted),
        frames=frames,
        beams=options.beams,
        steps=options.steps,
        batch=options.batch,
        repeats=repeats,
        threads=threads,
        peer=None if options.no_peer or options.accelerate else peer,
        reference_steps=reference_steps,
        quick=options.quick,
        accelerate=options.accelerate,
        video=options.video,
    )
    return plan, options.output if options.scaling else options.json


def main(arguments: list[str] | None = None) -> int:
    try:
        plan, target = parse(arguments)
        with table.TerminalProgress() as progress:
            if isinstance(plan, scaling.Sweep):
                print(*scaling.run(plan, target, progress), sep="\n")
                return 0
            results, notes = measure.run(plan, progress)
    except (MPlug2Error, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table.show(results, notes)
    if target is not None:
        target.write_text(json.dumps(results, indent=1) + "\n")
    return 0
