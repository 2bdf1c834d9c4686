"""The level `video`: files to pixels, and files to captions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.case import Case
from bench.row import Key, Selection
from bench.video import captioning, decoding
from bench.video.files import BundledClips, Clips, missing

NAMES = ("decoding", "captioning files")
Files = dict[str, tuple[Callable[[], Clips | BundledClips], bool]]
"""Name -> the files, and whether --quick measures them."""
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
    """The keys. "decoding" runs on the CPU in float32, to the pixels of the preset. "captioning files" uses the bundled
    tiny model, whatever the preset, in each dtype. There are none if `notes` says why."""
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
    return [f"level video is skipped: {why}"] if why else []


def build(key: Key, *, compile: bool) -> Case:
    """Ours and "reference", for captions also "eager". Decoding has no compiled form.

    From now on this process computes on one thread, because frames and model are too small for more, and on a busy
    machine threads wait for one another. Decoding beside the model has its own thread.

    Raises `ImportError` if PyAV is missing.
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
