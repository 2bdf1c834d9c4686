"""Options that several commands share, one by one and in groups."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, get_type_hints

import typer

from mplug2_fast.cli.console import reporting


class Dtype(str, Enum):
    """Values of `--dtype`."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    fp8 = "fp8"


VIDEOS_HELP = "Videos or images. With --out also folders, and .txt lists with one path per line."
Videos = Annotated[list[str], typer.Argument(metavar="PATH", help=VIDEOS_HELP)]
OptionalVideos = Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help=VIDEOS_HELP)]
TEXTS_HELP = (
    "With --out: JSON lines with path, question (the text) and, optionally, id. For a task on texts alone: a .txt file "
    "with one text per line."
)
OutOption = Annotated[str | None, typer.Option(metavar="PATH", help="Output file; rerun the same command to resume.")]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="An official .pth, a directory, a .safetensors, or owner/name on the Hub.  [default: the tiny model]",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="auto: float32 on the CPU, bfloat16 or float16 on a GPU. int8, fp8: 8-bit weights, on a CPU and on a GPU."
    ),
]
KeepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="PATTERN",
        help="With int8 or fp8: layers that are not rounded, such as 'decoder.*'; repeat it for several.",
    ),
]
DeviceOption = Annotated[str, typer.Option(metavar="[auto|cpu|cuda|cuda:N]", help="auto: a GPU, if available.")]
BeamsOption = Annotated[int | None, typer.Option(min=1, help="Number of beams.  [default: the model's]")]
ReturnOption = Annotated[int, typer.Option(min=1, help="Results per file, best first, one per line.")]
MinLengthOption = Annotated[int | None, typer.Option(min=0, help="Minimum number of tokens.  [default: the model's]")]
MaxLengthOption = Annotated[int | None, typer.Option(min=1, help="Maximum number of tokens.  [default: the model's]")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object per file, one per line.")]


class Space(str, Enum):
    """Values of `--features`."""

    contrast = "contrast"
    clip = "clip"


SpaceOption = Annotated[
    Space,
    typer.Option(
        "--features", help="contrast: of the model's retrieval. clip: of CLIP's towers, which official files have."
    ),
]

# Options of runs with --out.
RetryOption = Annotated[
    bool, typer.Option("--retry-failed", help="Also retry the files that an earlier run recorded as failed.")
]
FramesOption = Annotated[int | None, typer.Option(min=1, help="Frames per clip.  [default: the model's]")]
WindowsOption = Annotated[
    int | None,
    typer.Option(metavar="LENGTH", min=1, help="Split the video into windows of LENGTH consecutive frames."),
]
StrideOption = Annotated[
    int | None, typer.Option(min=1, help="Frames from the start of a window to the next start.  [default: LENGTH]")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Decoding processes.  [default: depends on the number of cores]")
]


class Decoder(str, Enum):
    """Values of `--decoder`."""

    pyav = "pyav"
    torchcodec = "torchcodec"
    dali = "dali"


DecoderOption = Annotated[
    Decoder | None, typer.Option(help="dali decodes on the GPU, without --num-workers and --timeout.  [default: pyav]")
]
TimeoutOption = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="Decode timeout per clip.  [default: 60]"),
]
BatchMemoryOption = Annotated[
    float | None,
    typer.Option(metavar="GIB", help="Memory for a batch.  [default: a share of the free memory]"),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it computes."""

    checkpoint: CheckpointOption = None
    dtype: DtypeOption = Dtype.auto
    keep: KeepOption = None
    device: DeviceOption = "auto"


@dataclass(frozen=True)
class SearchOptions:
    """Options of beam search."""

    num_beams: BeamsOption = None
    num_return: ReturnOption = 1
    min_length: MinLengthOption = None
    max_length: MaxLengthOption = None


def grouped(command: Callable[..., None], without: Collection[str] = ()) -> Callable[..., None]:
    """A command for typer, of a function some of whose parameters are groups: dataclasses with a field per option.

    The command has the options of each group, but those in `without`. Errors are reported as by `reporting`.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    groups = {name: each.annotation for name, each in parameters.items() if dataclasses.is_dataclass(each.annotation)}
    options: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        options += _options(groups[name], without) if name in groups else [parameter]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        with reporting():
            for name, group in groups.items():
                values = {f.name: given.pop(f.name) for f in dataclasses.fields(group) if f.name in given}
                given[name] = group(**values)
            command(**given)

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
    )
    run.__annotations__ = {}  # typer reads the signature
    return run


def _options(group: Any, without: Collection[str]) -> list[inspect.Parameter]:
    kinds = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=kinds[f.name])
        for f in dataclasses.fields(group)
        if f.name not in without
    ]
