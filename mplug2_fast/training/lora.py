"""Low-rank adapters by peft, chosen by official names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mplug2_fast.errors import ConfigError
from mplug2_fast.training.optimizer import matching
from mplug2_fast.training.recipe import Lora

_ADAPTER = "default"


def add(model: nn.Module, settings: Lora, names: Mapping[str, str]) -> None:
    """Add adapters to the linear layers whose official weight matches a target. Only they are trained then.

    Args:
        model: changed in place. settings: rank, scale and targets. names: parameter name -> official name.

    Raises:
        ConfigError: a target matches no linear layer. ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'mplug2-fast[train]'") from error
    layers = {
        official: path.removesuffix(".weight")
        for path, official in names.items()
        if path.endswith(".weight") and type(model.get_submodule(path.rpartition(".")[0])) is nn.Linear
    }
    try:
        targets = [layers[official] for official in sorted(matching(layers, settings.targets))]
    except ValueError as error:
        raise ConfigError(
            f"lora: {error}; adapters go to linear layers alone, and query, key and value are one parameter here"
        ) from None
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets
    )
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)


def merged(tensors: Mapping[str, Tensor], settings: Lora) -> dict[str, Tensor]:
    """Parameters by name, with the adapters added to the weights that they belong to."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer != name:
            down, up = (tensors[f"{layer}.lora_{side}.{_ADAPTER}.weight"] for side in "AB")
            tensor = tensor + settings.alpha / settings.rank * (up @ down)
        plain[name.replace(".base_layer.", ".")] = tensor
    return plain
