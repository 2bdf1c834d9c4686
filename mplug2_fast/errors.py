"""The errors that a caller may want to catch: one base, one class for each kind of bad input."""

from __future__ import annotations


class MPlug2Error(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(MPlug2Error, ValueError):
    """A configuration that contradicts itself or that the model cannot have."""


class CheckpointError(MPlug2Error):
    """A checkpoint that cannot be read, or that is not the one the model needs."""


class VideoError(MPlug2Error):
    """A video or image file that cannot be turned into frames."""


class BackendError(MPlug2Error, RuntimeError):
    """An operator's backend that was asked for, or that was made for the device, cannot serve a call."""
