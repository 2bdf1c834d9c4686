"""`python bench/run.py --ops`: each operator at the model's sizes, against what it is held against.

python bench/run.py --ops                               # all of them at the Large model's sizes: about five minutes
python bench/run.py --ops attention,mlp --dtype bfloat16 --json ops.json
python bench/run.py --ops --device cuda
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from bench import table as shared
from bench.ops import measure, table
from mplug2_fast import ops
from mplug2_fast.devices import pick_device
from mplug2_fast.errors import ConfigError
from mplug2_fast.ops import native


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bench/run.py --ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ops", nargs="?", const=",".join(ops.OPERATORS), metavar="OP[,OP]", help=f"{', '.join(ops.OPERATORS)}")
    add("--preset", choices=("base", "large"), default="large", help="sizes (default: large)")
    add("--dtype", default="float32,bfloat16", metavar="DTYPE[,DTYPE]", help="float32, bfloat16 (default: both)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    add("--no-peer", action="store_true", help="leave torch.compile out, which takes most of the time")
    add("--json", type=Path, metavar="FILE", help="write the results here")
    options = parser.parse_args(arguments)
    names, dtypes = options.ops.split(","), options.dtype.split(",")
    known = [str(dtype).removeprefix("torch.") for dtype in native.DTYPES]
    for chosen, choices in ((names, ops.OPERATORS), (dtypes, known)):
        for name in chosen:
            if name not in choices:
                parser.error(f"no such choice {name!r}: choose from {', '.join(choices)}")
    try:
        device = str(pick_device(options.device))
    except ConfigError as error:
        parser.error(str(error))
    with shared.TerminalProgress() as progress:
        results = measure.run(
            names, options.preset, dtypes, device, options.threads, progress, compile=not options.no_peer
        )
    table.show(results)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    for failed in results["failed"]:
        print("error: {op}, {sizes}, {dtype}: {error}".format(**failed), file=sys.stderr)
    return 1 if results["failed"] else 0
