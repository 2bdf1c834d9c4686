"""The official vision block: CLIP's residual attention block with two local temporal modules."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mplug2_fast.acceleration import gain, int8, trial
from mplug2_fast.acceleration.basic import ACTIVATIONS, attend, laid_out_like, require_attention, run_mlp
from mplug2_fast.acceleration.local_temporal import compute
from mplug2_fast.acceleration.products import normalised
from mplug2_fast.acceleration.structure import has, require, require_children, require_linear, require_norm
from mplug2_fast.acceleration.swap import Kind, State, Unserved, Unsuitable
from mplug2_fast.ops.linear_act import Activation

_CHILDREN = {"lmhra1", "lmhra2", "attn", "ln_1", "mlp", "ln_2", "drop_path"}
_WITHOUT_EFFECT = {"use_checkpoint"}


@dataclass(frozen=True)
class FoundBlock:
    """frames, default: name and default of the argument with the number of frames."""

    activation: Activation
    frames: str
    default: Any


class TemporalBlockKind(Kind):
    """Local temporal module, attention within each frame, local temporal module, MLP; batch-first in memory."""

    is_faster_in_training = True

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        return has(module, "lmhra1", "lmhra2", "attn", "ln_1", "mlp", "ln_2")

    @staticmethod
    def recognise(module: nn.Module) -> FoundBlock:
        require_children(module, _CHILDREN)
        require(getattr(module, "attn_mask", None) is None, "its attention has a mask (attn_mask)")
        require(isinstance(module.attn, nn.MultiheadAttention), "attn is not a MultiheadAttention")
        require_attention(module.attn)
        for name in ("ln_1", "ln_2"):
            require_norm(module, name)
        for name in ("lmhra1", "lmhra2"):
            _require_temporal(module, name)
        require(has(module.mlp, "c_fc", "c_proj"), "mlp has no c_fc and c_proj")
        layers = [require_linear(module, name) for name in ("mlp.c_fc", "mlp.c_proj")]
        require(len(module.mlp._modules) == 3, "mlp has other parts than c_fc, an activation and c_proj")
        frames = list(inspect.signature(module.forward).parameters.values())[1:2]
        require(bool(frames), "its forward takes no number of frames")
        width = module.ln_1.normalized_shape[0]
        with trial.conditions(module):
            activation = trial.activation_of(module.mlp, ACTIVATIONS, *layers)
            found = FoundBlock(activation, frames[0].name, frames[0].default)
            for count in (1, 3):
                x = trial.random(5, 2 * count, width, seed=count)
                expected = trial.outcome(type(module).forward, module, x, count)
                if not trial.agree(expected, run(module, found, x, count), without=x):
                    raise Unsuitable("on a trial input it computes something other than the official block")
        return found

    @staticmethod
    def weight(module: Any) -> Tensor:
        return module.mlp.c_fc.weight

    @classmethod
    def pays(cls, state: State, x: Tensor) -> bool:
        return gain.of_block(x, state.size)

    @staticmethod
    def forward(module: Any, state: State, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = state.found
        frames = args[0] if args else kwargs.pop(found.frames, found.default)
        if len(args) > 2 or kwargs.keys() - _WITHOUT_EFFECT or not isinstance(frames, int):
            raise Unserved("it was called with unknown arguments")
        if module.training and not isinstance(module._modules.get("drop_path"), (nn.Identity, type(None))):
            raise Unserved("it drops paths in training")
        return run(module, found, x, frames)


def _require_temporal(module: nn.Module, name: str) -> None:
    temporal = module.get_submodule(name)
    require(has(temporal, "ln", "down_proj", "conv", "up_proj"), f"{name} has no ln, down_proj, conv and up_proj")
    width = require_norm(temporal, "ln").normalized_shape[0]
    down, conv, up = (temporal.get_submodule(part) for part in ("down_proj", "conv", "up_proj"))
    inner = down.weight.shape[0]
    shapes = {"down_proj": (down, (inner, width, 1, 1, 1)), "up_proj": (up, (width, inner, 1, 1, 1))}
    shapes["conv"] = (conv, (inner, 1, conv.weight.shape[2], 1, 1))
    for part, (convolution, shape) in shapes.items():
        fits = isinstance(convolution, nn.Conv3d) and tuple(convolution.weight.shape) == shape
        require(fits and convolution.bias is not None, f"{name}.{part} is not the expected convolution")


def run(block: Any, found: FoundBlock, x: Tensor, frames: int) -> Tensor:
    """The block on x `(1 + patches, batch·frames, channels)`."""
    tokens, rows, width = x.shape
    if rows % frames:
        raise Unserved(f"{rows} rows are not a multiple of {frames} frames")

    def temporal(module: Any, h: Tensor) -> Tensor:
        layers = (module.ln, module.down_proj, module.conv, module.up_proj)
        h = h.view(rows // frames, frames, tokens, width)
        out = compute(h, layers, activation="quick_gelu", class_token=True, residual=True)
        return out.view(rows, tokens, width)

    h = temporal(block.lmhra1, x.transpose(0, 1).reshape(rows, tokens, width))
    normed = int8.mark(normalised(block.ln_1, h), block.ln_1)
    h = temporal(block.lmhra2, attend(block.attn, normed, normed, residual=h))
    h = run_mlp(h, block.mlp.c_fc, block.mlp.c_proj, found.activation, norm=block.ln_2, residual=True)
    return laid_out_like(x, h.to(x.dtype))
