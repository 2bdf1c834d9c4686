"""Low-rank adapters, chosen by official names.

Adapters of linear layers are peft's. Queries, keys and values share one parameter here, so their adapters are added to
parts of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from mplug2_fast.errors import ConfigError
from mplug2_fast.nn.attention import FusedProjections
from mplug2_fast.training.optimizer import matching
from mplug2_fast.training.recipe import Lora

_ADAPTER = "default"
_FUSED = "in_proj_weight"


def add(model: Any, settings: Lora) -> None:
    """Add adapters to the weights whose official names match a target. Only the adapters are trained then.

    Args:
        model: changed in place. settings: rank, scale and targets.

    Raises:
        ConfigError: a target matches no weight that can have an adapter. ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'mplug2-fast[train]'") from error
    entries = {entry.official: entry for entry in model.official_names.entries if _can_have_adapter(model, entry.path)}
    try:
        chosen = [entries[official] for official in sorted(matching(entries, settings.targets))]
    except ValueError as error:
        raise ConfigError(f"lora: {error}; only linear layers and queries, keys and values can have adapters") from None
    layers = [entry.path.removesuffix(".weight") for entry in chosen if entry.path.endswith(".weight")]
    fused: dict[str, dict[int, int]] = {}
    for entry in chosen:
        if entry.path.endswith(_FUSED):
            fused.setdefault(entry.path.removesuffix(f".{_FUSED}"), {})[entry.part] = entry.shape[0]
    if fused and settings.dropout:
        raise ConfigError("lora: adapters of queries, keys and values have no dropout: set dropout to 0")
    model.requires_grad_(False)
    if layers:
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=layers
        )
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for path, parts in fused.items():
        module = model.get_submodule(path)
        register_parametrization(module, _FUSED, _Adapters(getattr(module, _FUSED), parts, settings))


def merged(tensors: Mapping[str, Tensor], settings: Lora) -> dict[str, Tensor]:
    """Parameters by name, with the adapters added to the weights that they belong to."""
    scale, plain = settings.alpha / settings.rank, {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            continue
        layer, _, fused = name.removesuffix(".original").partition(".parametrizations.")
        if fused:
            before = f"{layer}.parametrizations.{fused}.0.lora_"
            parts = [key.removeprefix(f"{before}A.") for key in tensors if key.startswith(f"{before}A.")]
            factors = {int(part): (tensors[f"{before}B.{part}"], tensors[f"{before}A.{part}"]) for part in parts}
            plain[f"{layer}.{fused}"] = _adapted(tensor, factors, scale)
        elif name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            down, up = (tensors[f"{layer}.lora_{side}.{_ADAPTER}.weight"] for side in "AB")
            plain[f"{layer}.weight"] = _adapted(tensor, {0: (up, down)}, scale)
        else:
            plain[name.replace(".base_layer.", ".")] = tensor
    return plain


def _can_have_adapter(model: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    return (name == "weight" and type(module) is nn.Linear) or (name == _FUSED and isinstance(module, FusedProjections))


class _Adapters(nn.Module):
    """Add adapters to parts of a weight `(rows, columns)`. They begin as peft's: A is random and B is zero."""

    def __init__(self, weight: Tensor, parts: Mapping[int, int], settings: Lora) -> None:
        """parts: position of a part -> its rows. All parts of a weight have equally many."""
        super().__init__()
        self._scale = settings.alpha / settings.rank
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for part, rows in parts.items():
            down = weight.new_empty(settings.rank, weight.shape[1])
            self.lora_A[str(part)] = nn.Parameter(nn.init.kaiming_uniform_(down, a=math.sqrt(5)))
            self.lora_B[str(part)] = nn.Parameter(weight.new_zeros(rows, settings.rank))

    def forward(self, weight: Tensor) -> Tensor:
        return _adapted(
            weight, {int(part): (self.lora_B[part], self.lora_A[part]) for part in self.lora_A}, self._scale
        )


def _adapted(weight: Tensor, factors: Mapping[int, tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """weight + scale · (up @ down), for each part that has factors up and down."""
    rows = next(iter(factors.values()))[0].shape[0]
    parts = list(weight.split(rows))
    for part, (up, down) in factors.items():
        parts[part] = parts[part] + scale * (up @ down)
    return torch.cat(parts)
