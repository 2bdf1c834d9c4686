"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Dtype(str, Enum):
    """The names that `--dtype` knows."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


VIDEOS_HELP = "Videos or images; with --out also folders of them, and .txt lists of all these, one a line."
Videos = Annotated[list[str], typer.Argument(metavar="PATH", help=VIDEOS_HELP)]
OutOption = Annotated[
    str | None, typer.Option(metavar="PATH", help="A file for the results, which a run that was stopped goes on with.")
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="An official .pth, a directory, a .safetensors, or owner/name on the Hub.  [default: the tiny model]",
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="auto: float32 on the CPU, bfloat16 or float16 on a GPU.")]
DeviceOption = Annotated[str, typer.Option(metavar="[auto|cpu|cuda|cuda:N]", help="auto: a GPU where there is one.")]
BeamsOption = Annotated[int | None, typer.Option(min=1, help="Beams of the search.  [default: the model's]")]
ReturnOption = Annotated[int, typer.Option(min=1, help="Texts a file, best first, each on a line of its own.")]
MinLengthOption = Annotated[int | None, typer.Option(min=0, help="Tokens at least.  [default: the model's]")]
MaxLengthOption = Annotated[int | None, typer.Option(min=1, help="Tokens at most.  [default: the model's]")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a file, each on a line of its own.")]

# Of runs with --out.
RetryOption = Annotated[
    bool, typer.Option("--retry-failed", help="Also do the files that an earlier run recorded as failed.")
]
FramesOption = Annotated[int | None, typer.Option(min=1, help="Frames of a clip.  [default: the model's]")]
WindowsOption = Annotated[
    int | None,
    typer.Option(metavar="LENGTH", min=1, help="Windows of so many consecutive frames, over the whole video."),
]
StrideOption = Annotated[
    int | None, typer.Option(min=1, help="Frames from one window to the next.  [default: their length]")
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Processes that decode.  [default: by the number of cores]")
]


class Decoder(str, Enum):
    """The names that `--decoder` knows."""

    pyav = "pyav"
    torchcodec = "torchcodec"
    dali = "dali"


DecoderOption = Annotated[
    Decoder | None, typer.Option(help="dali decodes on the GPU, without --num-workers and --timeout.  [default: pyav]")
]
TimeoutOption = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="The most that decoding a clip may take.  [default: 60]"),
]
BatchMemoryOption = Annotated[
    float | None,
    typer.Option(metavar="GIB", help="Memory for a batch.  [default: a share of what is free]"),
]
