"""mPLUG: the preparation of a case's picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mplug2_fast.images import randaugment
from mplug2_fast.images.augment import flipped
from mplug2_fast.images.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    Placement,
    in_square,
    normalise,
    normalise_in_square,
    resize,
)
from tests.golden.cases import GoldenCase

OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "Identity": lambda pixels: pixels,
    "AutoContrast": randaugment.auto_contrast,
    "Equalize": randaugment.equalize,
    "Brightness": randaugment.brightness,
    "Sharpness": randaugment.sharpness,
    "ShearX": lambda pixels, factor, fill: randaugment.shear_x(pixels, factor),
    "ShearY": lambda pixels, factor, fill: randaugment.shear_y(pixels, factor),
    "TranslateX": lambda pixels, offset, fill: randaugment.translate_x(pixels, offset),
    "TranslateY": lambda pixels, offset, fill: randaugment.translate_y(pixels, offset),
    "Rotate": lambda pixels, degrees, fill: randaugment.rotate(pixels, degrees),
}


def pictures_of(case: GoldenCase) -> dict[str, Tensor]:
    """The pixels at test time, and the random changes of training at the case's arguments."""
    picture, size = case.picture, case.description["config"]["image_res"]
    if "picture_box" in case.description:
        return _grounding(case, picture, size)
    frames = torch.from_numpy(resize(picture, size, size, bicubic=True))[None]
    augmented = {
        f"augment:{name}": torch.from_numpy(OPERATIONS[name](picture, *arguments).copy())
        for name, arguments in case.description.get("augment_args", {}).items()
    }
    return {"pixels": normalise(frames)[:, 0], **augmented}


def _grounding(case: GoldenCase, picture: np.ndarray, size: int) -> dict[str, Tensor]:
    height, width = picture.shape[:2]
    place = Placement.centred(width, height, size)
    frames = torch.from_numpy(in_square(picture, size))[None]
    x, y, w, h = case.description["picture_box"]
    box = place.box_in_square(((x + w / 2) / width, (y + h / 2) / height, w / width, h / height), width, height)
    mirrored = flipped(picture, case.description["flipped_text"][0], np.array([x, y, x + w, y + h]))
    assert mirrored[1] == case.description["flipped_text"][1]
    return {
        "pixels": normalise_in_square(frames, place)[:, 0],
        "train_pixels": normalise_in_square(frames, place, CLIP_MEAN, CLIP_STD)[:, 0],
        "picture_target": torch.tensor(box),
        "flipped_box": torch.from_numpy(mirrored[2]).float(),
    }
