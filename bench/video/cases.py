"""The level `video`: what there is to measure, and each of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.case import Case
from bench.row import Key
from bench.selection import Selection
from bench.video import captioning, decoding
from bench.video.files import BundledClips, Clips, missing

NAMES = ("decoding", "captioning files")
# What the files are, and whether --quick measures them.
Files = dict[str, tuple[Callable[[], Clips | BundledClips], bool]]
DECODING: Files = {
    "16 frames of 256 px": (partial(Clips, 4, 16, 256), False),
    "120 frames of 256 px": (partial(Clips, 2, 120, 256), True),
    "240 frames of 360 px": (partial(Clips, 2, 240, 360), False),
}
CAPTIONING: Files = {
    "6 clips of 128 px": (BundledClips, False),
    "6 clips of 512 px": (partial(Clips, 6, 16, 512), False),
}


def keys(selection: Selection) -> list[Key]:
    """Of "decoding" to the pixels of the preset, in float32 and on the CPU alone; of "captioning files" by the tiny
    model that ships, whatever the preset, in every dtype. None where `notes` says why."""
    if missing() or "forward" not in selection.directions:
        return []
    found = []
    if selection.device == "cpu" and "float32" in selection.dtypes:
        found += [("decoding", selection.preset, files, "float32") for files in _files(DECODING, selection)]
    for files in _files(CAPTIONING, selection):
        found += [("captioning files", "tiny", files, dtype) for dtype in selection.dtypes]
    rows = [
        Key("video", name, f"{preset}, {files}", "forward", dtype, selection.device)
        for name, preset, files, dtype in found
    ]
    return [key for key in rows if selection.wants(key)]


def notes() -> list[str]:
    """Why there are no keys."""
    why = missing()
    return [f"the level video is not measured: {why}"] if why else []


def build(key: Key, *, compile: bool) -> Case:
    """Ours and "reference"; of captions also "eager". There is no compiled form of a program that decodes files.

    From here on this process computes on one thread, whatever was asked for: the frames and the model are too small for
    more, and threads that wait for one another take any time on a busy machine. Decoding beside the model has another.

    Raises `ImportError` where PyAV is not installed.
    """
    if why := missing():
        raise ImportError(why)
    torch.set_num_threads(1)
    preset, files = key.sizes.split(", ", 1)
    if key.name == "decoding":
        return decoding.build(key, preset, DECODING[files][0]())
    return captioning.build(key, CAPTIONING[files][0]())


def _files(all_files: Files, selection: Selection) -> list[str]:
    return [name for name, (_, quick) in all_files.items() if quick or not selection.quick]
