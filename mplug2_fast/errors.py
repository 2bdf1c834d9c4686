"""The errors of this package: a base class, and a class for each kind of bad input."""

from __future__ import annotations

import re


class MPlug2Error(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(MPlug2Error, ValueError):
    """A configuration that contradicts itself or that the model does not support."""


class CheckpointError(MPlug2Error):
    """A checkpoint that cannot be read, or that does not fit the model."""


class VideoError(MPlug2Error):
    """A video or image file that cannot be turned into frames."""


class DataError(MPlug2Error, ValueError):
    """A data set, or a line of it, that cannot be used."""


class BackendError(MPlug2Error, RuntimeError):
    """A forced backend, or one that was written for the device, cannot serve an operator's call."""


class NotFiniteError(MPlug2Error, ArithmeticError):
    """The model's results for a video are NaN or infinite."""


def printable(text: str, longest: int = 300) -> str:
    """Text from outside for a message: on one line, with control characters escaped, cut if it is long."""
    escaped = re.sub(r"[^ -~]", lambda found: found[0] if found[0].isprintable() else _escape(found[0]), text)
    return escaped if len(escaped) <= longest else f"{escaped[:longest]}..."


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
