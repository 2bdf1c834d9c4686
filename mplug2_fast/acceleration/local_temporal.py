"""Local temporal modules outside the official vision block: those of mPLUG-2, Youku-mPLUG and mPLUG-Owl-video,
UniFormerV2's local MHRA and ST-Adapter."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mplug2_fast.acceleration import gain, trial
from mplug2_fast.acceleration.basic import laid_out_like
from mplug2_fast.acceleration.products import keep_packed, normalised, two_products
from mplug2_fast.acceleration.structure import is_plain, require, require_norm
from mplug2_fast.acceleration.swap import Kind, State, Unserved, Unsuitable
from mplug2_fast.nn import local_temporal
from mplug2_fast.ops.linear_act import EAGER, Activation
from mplug2_fast.ops.runtime.autocast import autocast_dtype

_AXES = {"volume": 5, "tokens": 4, "frames": 3, "sequence": 3}
"""Axes of x in each layout: (batch, channels, frames, height, width), (batch, frames, tokens, channels),
(batch·frames, tokens, channels) and (tokens, batch·frames, channels)."""

_ANY, _MIN_SQUARE = 6, 4
_TOKENS = (_ANY + 1, *(side * side + token for side in (2, 4, 7, 8, 12, 14, 16, 18, 24, 32) for token in (1, 0)))
"""Tokens per frame to try. Some modules accept only squares, with or without a class token, or only one size."""

_BATCH = 2


@dataclass(frozen=True)
class Layers:
    """Paths of the layers inside a module; norm is None for a module without a norm."""

    norm: str | None
    down: str
    conv: str
    up: str

    def of(self, module: nn.Module) -> tuple[Any, Any, Any, Any]:
        norm = None if self.norm is None else module.get_submodule(self.norm)
        down, conv, up = (module.get_submodule(name) for name in (self.down, self.conv, self.up))
        return norm, down, conv, up


@dataclass(frozen=True)
class FoundTemporal:
    """How a module computes.

    Attributes:
        x, frames: names of its arguments; frames is None if the shape of x gives the number of frames.
        default: of the argument `frames`.
        layout: of x, a key of `_AXES`.
        patches: the first number of patches per frame that it accepted: `_ANY`, which is no square, or a square.
        eval_only: whether it computes something else in training.
        dense: whether its result is contiguous if its input is; for the layout "sequence".
        class_token: whether the first token of each frame passes unchanged.
        residual: whether it returns the sum with its input.
        in_place: whether it writes that sum into its input.
    """

    layers: Layers
    x: str
    frames: str | None
    default: Any
    layout: str
    patches: int = _ANY
    eval_only: bool = False
    dense: bool = True
    activation: Activation = "none"
    class_token: bool = False
    residual: bool = False
    in_place: bool = False


class LocalTemporalKind(Kind):
    """Norm or none, down-projection, depthwise convolution over time, activation or none, up-projection."""

    is_faster_in_training = True

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        return _layers_of(module) is not None

    @staticmethod
    def recognise(module: nn.Module) -> FoundTemporal:
        layers = _layers_of(module)
        assert layers is not None
        _require_layers(module, layers)
        arguments = list(inspect.signature(module.forward).parameters.values())
        named = all(argument.kind is argument.POSITIONAL_OR_KEYWORD for argument in arguments)
        require(named and 0 < len(arguments) <= 2, "its forward takes other arguments than x and a number of frames")
        frames = arguments[1] if len(arguments) == 2 else None
        layouts = ("volume", "tokens") if frames is None else ("frames", "sequence")
        default = None if frames is None else frames.default
        name = None if frames is None else frames.name
        with trial.conditions(module):
            refusals = []
            for layout in layouts:
                try:
                    return _try_out(module, FoundTemporal(layers, arguments[0].name, name, default, layout))
                except Unsuitable as reason:
                    refusals.append(f"{layout}: {reason}")
        raise Unsuitable(f"it is not a known local temporal module ({'; '.join(refusals)})")

    @staticmethod
    def weight(module: Any) -> Tensor:
        layers = _layers_of(module)
        assert layers is not None
        return layers.of(module)[1].weight

    @staticmethod
    def products(module: Any, found: FoundTemporal) -> dict[str, tuple[nn.Module, Tensor]]:
        norm, down, _, up = found.layers.of(module)
        layers = {found.layers.down: down, found.layers.up: up} if not isinstance(norm, _BatchNorm) else {}
        return {name: (layer, layer.weight) for name, layer in layers.items() if not isinstance(layer, nn.Linear)}

    @classmethod
    def pays(cls, state: State, x: Tensor) -> bool:
        return gain.of_local_temporal(x, state.size)

    @staticmethod
    def forward(module: Any, state: State, *args: Any, **kwargs: Any) -> Tensor:
        found = state.found
        names = [name for name in (found.x, found.frames) if name is not None]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, frames = given.pop(found.x), given.pop(found.frames, found.default)
        if given or len(args) > len(names):
            raise Unserved("it was called with unknown arguments")
        state.require_no_dropout()
        if found.eval_only and any(part.module.training for part in state.parts):
            raise Unserved("it computes something else in training")
        return run(module, found, x, frames)


def _layers_of(module: nn.Module) -> Layers | None:
    """The layers of a module with a depthwise convolution over time between two products, at most one norm, and no
    other parameters."""
    found: list[tuple[str, nn.Module]] = []
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) or any(p is not None for p in part._parameters.values()):
            found.append((name, part))
        if len(found) > 4:
            return None
    norms = [name for name, part in found if isinstance(part, (nn.LayerNorm, _BatchNorm))]
    others = [(name, part) for name, part in found if name not in norms]
    if len(others) != 3 or len(norms) > 1 or not all(isinstance(part, (nn.Linear, _ConvNd)) for _, part in others):
        return None
    convolutions = [name for name, part in others if isinstance(part, _ConvNd) and _is_over_time(part)]
    if len(convolutions) != 1:
        return None
    inner = next(part.out_channels for name, part in others if name in convolutions)
    down, up = ((name, _channels(part)) for name, part in others if name not in convolutions)
    if down[1] != up[1][::-1]:
        return None
    if down[1][1] != inner:
        down, up = up, down
    return Layers(norms[0] if norms else None, down[0], convolutions[0], up[0])


def _channels(layer: Any) -> tuple[int, int]:
    """Input and output channels. A layer whose weights do not exist yet knows them too."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _is_over_time(conv: _ConvNd) -> bool:
    return conv.groups == conv.in_channels and conv.kernel_size[0] > 1 and math.prod(conv.kernel_size[1:]) == 1


def _require_layers(module: nn.Module, layers: Layers) -> None:
    norm, *others = layers.of(module)
    if isinstance(norm, nn.LayerNorm):
        require_norm(module, layers.norm or "")
    elif norm is not None:
        plain = any(is_plain(norm, kind) for kind in (nn.BatchNorm3d, nn.SyncBatchNorm))
        require(plain, f"{layers.norm} is a {type(norm).__name__}, not a BatchNorm3d")
        require(norm.running_mean is not None, f"{layers.norm} keeps no running statistics")
    for name, layer in zip((layers.down, layers.conv, layers.up), others, strict=True):
        plain = any(is_plain(layer, kind) for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        require(plain, f"the class of {name} replaces forward")
    try:
        local_temporal.check_layers(norm, *others)
    except ValueError as error:
        raise Unsuitable(str(error)) from error


def _try_out(module: nn.Module, found: FoundTemporal) -> FoundTemporal:
    """Finds out how a module computes on x in one layout. Raises `Unsuitable` for other modules."""
    tokens, expected, in_place = _first_that_runs(module, found)
    laid_out = replace(found, in_place=in_place, dense=expected.is_contiguous())
    single, _ = _outcome(module, found, tokens, 1)
    for candidate in _candidates(laid_out, tokens):
        if _agrees(module, candidate, tokens, 3, expected) and _agrees(module, candidate, tokens, 1, single):
            return replace(candidate, eval_only=_differs_in_training(module, found, tokens, expected))
    raise Unsuitable("it computes something other than a local temporal module")


def _first_that_runs(module: nn.Module, found: FoundTemporal) -> tuple[int, Tensor, bool]:
    """The first number of tokens that a module accepts, its result, and whether the result is its input."""
    refusal: Unsuitable | None = None
    for tokens in _TOKENS:
        try:
            return tokens, *_outcome(module, found, tokens, 3)
        except Unsuitable as reason:
            refusal = refusal or reason
    assert refusal is not None
    raise refusal


def _outcome(module: nn.Module, found: FoundTemporal, tokens: int, frames: int) -> tuple[Tensor, bool]:
    """The result for a trial input, and whether it is the input itself."""
    x = _input(module, found, tokens, frames)
    given = x.clone()
    arguments = {} if found.frames is None else {found.frames: frames}
    result = trial.outcome(type(module).forward, module, given, **arguments)
    require(isinstance(result, Tensor) and result.shape == x.shape, "it does not return a tensor of its input's shape")
    require(result is given or torch.equal(given, x), "it changes its input")
    return result, result is given


def _input(module: nn.Module, found: FoundTemporal, tokens: int, frames: int) -> Tensor:
    channels = found.layers.of(module)[3].weight.shape[0]
    shapes = {
        "volume": (_BATCH, channels, frames, 1, tokens),
        "tokens": (_BATCH, frames, tokens, channels),
        "frames": (_BATCH * frames, tokens, channels),
        "sequence": (tokens, _BATCH * frames, channels),
    }
    return trial.random(*shapes[found.layout], seed=frames)


def _candidates(found: FoundTemporal, tokens: int) -> Iterator[FoundTemporal]:
    """All ways in which the module may compute."""
    class_tokens = (False,) if found.layout == "volume" else (True, False)
    residuals = (True,) if found.in_place else (True, False)
    for activation, class_token, residual in itertools.product(EAGER, class_tokens, residuals):
        patches = _ANY if tokens == _TOKENS[0] else tokens - class_token
        yield replace(found, patches=patches, activation=activation, class_token=class_token, residual=residual)


def _agrees(module: nn.Module, found: FoundTemporal, tokens: int, frames: int, expected: Tensor) -> bool:
    x = _input(module, found, tokens, frames)
    try:
        return trial.agree(expected, run(module, found, x.clone(), frames), without=x if found.residual else None)
    except Unserved:  # a number of patches that this candidate does not accept
        return False


def _differs_in_training(module: nn.Module, found: FoundTemporal, tokens: int, expected: Tensor) -> bool:
    """Whether a module, apart from its batch norm, computes something else in training."""
    for part in module.modules():
        part.training = not isinstance(part, _BatchNorm)
    try:
        return not trial.agree(expected, _outcome(module, found, tokens, 3)[0])
    finally:
        for part in module.modules():
            part.training = False


def run(module: nn.Module, found: FoundTemporal, x: Tensor, frames: Any) -> Tensor:
    """The module on x in its layout. Raises `Unserved` before it changes anything."""
    layers = found.layers.of(module)
    _require_types(x, layers[1:])
    if x.dim() != _AXES[found.layout]:
        raise Unserved(f"it was called with {x.dim()} axes")
    options = {"activation": found.activation, "class_token": found.class_token}
    if found.layout == "volume":
        out = compute(x.permute(0, 2, 3, 4, 1).flatten(2, 3), layers, residual=found.residual, **options)
        out = out.unflatten(2, x.shape[-2:]).permute(0, 4, 1, 2, 3)
        channels_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
        return out if channels_last else out.contiguous()
    tokens = x.transpose(0, 1) if found.layout == "sequence" else x
    _require_patches(found, tokens.shape[-2] - found.class_token)
    if found.layout == "tokens":
        videos = tokens
    else:
        if not isinstance(frames, int) or frames < 1 or tokens.shape[0] % frames:
            raise Unserved(f"{tokens.shape[0]} rows are not a multiple of {frames} frames")
        videos = tokens.unflatten(0, (-1, frames))
    if found.in_place:
        # Do not overwrite what the gradients need.
        update = compute(videos.clone() if torch.is_grad_enabled() else videos, layers, residual=False, **options)
        tokens, update = (t[..., int(found.class_token) :, :] for t in (tokens, update.view(tokens.shape)))
        tokens += update
        return x
    out = compute(videos, layers, residual=found.residual, **options).view(tokens.shape)
    if found.layout != "sequence":
        return out
    return laid_out_like(x, out) if found.dense else out.transpose(0, 1)


def _require_types(x: Tensor, layers: tuple[Any, ...]) -> None:
    if autocast_dtype(x) is None and any(layer.weight.dtype is not x.dtype for layer in layers):
        raise Unserved(f"it was called with {x.dtype}, and its parameters have another type")


def _require_patches(found: FoundTemporal, patches: int) -> None:
    """Raises `Unserved` for a number of patches that the module may reject."""
    if found.patches == _ANY:
        return
    square = math.isqrt(max(patches, 0)) ** 2 == patches
    if not square or (found.patches > _MIN_SQUARE and patches % found.patches):
        raise Unserved(f"it was called with {patches} patches per frame")


def compute(x: Tensor, layers: tuple[Any, ...], **options: Any) -> Tensor:
    """`nn.local_temporal.compute` of x `(batch, frames, tokens, channels)` with 8-bit or packed weights."""
    norm, down, conv, up = layers
    rounded = None if isinstance(norm, _BatchNorm) else two_products(x, down, up, norm)
    if rounded is not None:
        normed = None if norm is None else functools.partial(normalised, norm)
        return local_temporal.in_eight_bits(x, normed, rounded[0], conv, rounded[1], **options)
    rows = x.numel() // max(1, x.shape[-1])
    for layer in (down, up):
        if layer is up or not local_temporal.folds(norm, x):  # a folded weight is computed in each call
            keep_packed(layer.weight, rows)
    return local_temporal.compute(x, norm, down, conv, up, keep_class_token=True, **options)
