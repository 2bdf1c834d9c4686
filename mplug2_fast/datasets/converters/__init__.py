"""Converts official annotation files to one JSON Lines file per split."""

from __future__ import annotations

from mplug2_fast.datasets.converters import (
    didemo,
    glue,
    gqa,
    karpathy,
    kinetics,
    lsmdc,
    mplug,
    msrvtt,
    msvd,
    nlvr2,
    refcoco,
    snli_ve,
    something,
    tgif_qa,
    vatex,
    visual_genome,
    vqav2,
)
from mplug2_fast.datasets.converters.base import AnnotationFile, Conversion, Converter, convert

_MODULES = (
    *(msrvtt, msvd, tgif_qa, didemo, lsmdc, vatex, kinetics, something),
    *(karpathy, vqav2, visual_genome, gqa, refcoco, snli_ve, nlvr2),
    *(glue, mplug),
)

CONVERTERS: dict[str, Converter] = {converter.name: converter for module in _MODULES for converter in module.CONVERTERS}
"""Name -> converter."""

__all__ = ["CONVERTERS", "AnnotationFile", "Conversion", "Converter", "convert"]
