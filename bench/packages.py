"""Installed packages that operators are compared with, if they serve the operator, device and dtype.

No package is required, and none is imported before it is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.ops.bounds import Arguments, Prepare
from bench.row import Key
from mplug2_fast import ops
from mplug2_fast.ops.runtime import packages

LIGER = "liger_kernel"


def ways(op: str, arguments: Arguments) -> dict[str, Prepare]:
    """Package -> how to call it, for packages that serve these arguments of the operator `op`, forward."""
    return {name: prepare for name, prepare in _peers(op).items() if not _reason(name, op, arguments)}


def why_not(op: str, arguments: Arguments) -> dict[str, str]:
    """Package -> why it does not serve these arguments, for packages that know the operator."""
    return {name: reason for name in _peers(op) if (reason := _reason(name, op, arguments))}


def reasons(keys: Iterable[Key]) -> list[str]:
    """Which packages have no column for the operators of these keys: one line per reason."""
    operators: dict[tuple[str, str], list[str]] = {}
    asked = dict.fromkeys(
        (key.name, key.dtype, key.device) for key in keys if (key.level, key.direction) == ("ops", "forward")
    )
    for op, dtype, device in asked:
        spec = ops.OPERATORS[op].op.spec
        for name, reason in why_not(op, spec.inputs(spec.edge_cases[0], getattr(torch, dtype), device)).items():
            of = operators.setdefault((name, reason), [])
            if op not in of:
                of.append(op)
    return [f"no column {name} for {', '.join(of)}: {reason}" for (name, reason), of in operators.items()]


def _peers(op: str) -> dict[str, Prepare]:
    """The packages that know the operator: possible backends, and others."""
    operator = ops.OPERATORS[op].op
    peers: dict[str, Prepare] = {
        name: partial(_backend, operator.direct(name)) for name in packages.BACKENDS if name in operator.backends
    }
    if op == "layer_norm":
        peers[LIGER] = _liger_layer_norm
    return peers


def _reason(name: str, op: str, arguments: Arguments) -> str:
    if name == LIGER:
        return _liger_reason(arguments)
    with ops.use_backend(name):
        explanation = ops.OPERATORS[op].op.explain(*arguments.values())
    return "; ".join(explanation.reasons.get(name, ()))


def _backend(run: Callable[..., Any], arguments: Arguments) -> Callable[[], Any]:
    return partial(run, *arguments.values())


def _liger_layer_norm(arguments: Arguments) -> Callable[[], Any]:
    x, weight, bias = (arguments[name] for name in ("x", "weight", "bias"))
    norm = importlib.import_module("liger_kernel.transformers").LigerLayerNorm(x.shape[-1], eps=arguments["eps"])
    norm.weight, norm.bias = (nn.Parameter(each, requires_grad=False) for each in (weight, bias))
    return partial(norm, x)


def _liger_reason(arguments: Arguments) -> str:
    x, weight, bias = (arguments[name] for name in ("x", "weight", "bias"))
    if x.device.type != "cuda":
        return f"supports cuda, got {x.device}"
    if weight is None or bias is None:
        return "its layer norm needs a weight and a bias"
    return packages.error("liger_kernel.transformers", "pip install liger-kernel") or ""
