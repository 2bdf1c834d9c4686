"""Hooks, adapters and other changes on parts of modules have the same effect as on PyTorch's modules."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from mplug2_fast.nn import LocalTemporal, TemporalBlock
from mplug2_fast.ops.runtime.spec import NOISE_FLOOR
from tests.nn.cases import CASES, DIM, HEADS, randomise
from tests.nn.changes import CALLS, GRADIENTS, compiled, parametrisation
from tests.nn.test_promises import gradients
from tests.tolerance import relative

LOCAL = {
    "LocalTemporal": lambda: LocalTemporal(DIM),
    "LocalTemporal, batch norm": lambda: LocalTemporal(DIM, norm="batch", residual=False),
    "LocalTemporal, channels first": lambda: LocalTemporal(
        DIM, norm="batch", activation="gelu", class_token=False, layout="channels_first"
    ),
    "LocalTemporal around linear layers": lambda: LocalTemporal.around(
        norm=nn.LayerNorm(DIM),
        down_proj=nn.Linear(DIM, 8),
        conv=nn.Conv1d(8, 8, 3, padding=1, groups=8),
        up_proj=nn.Linear(8, DIM, bias=False),
        class_token=False,
    ),
    "LocalTemporal around convolutions": lambda: LocalTemporal.around(
        norm=None,
        down_proj=nn.Conv2d(DIM, 8, 1),
        conv=nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=8),
        up_proj=nn.Conv1d(8, DIM, 1),
    ),
}


def make(name):
    """A module with random parameters and inputs for it."""
    torch.manual_seed(0)
    if name in CASES:
        return randomise(CASES[name].make()), CASES[name].inputs(2)
    module = randomise(LOCAL[name]())
    for value in module.buffers():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    shape = (2, DIM, 3, 2, 2) if module.layout == "channels_first" else (2, 3, 5, DIM)
    return module, {"x": torch.randn(shape)}


NAMES = [*CASES, *LOCAL]
WITH_PARTS = [name for name in NAMES if name != "LayerNorm"]
FEW = ["MLP", "CrossAttention", "TemporalBlock", "FusionLayer", "LocalTemporal, batch norm"]


def parts(module, inputs):
    """The names of all inner modules that take part in a call with these inputs."""
    found = [name for name, part in module.named_modules() if name and not isinstance(part, nn.ModuleDict)]
    return [name for name in found if not name.startswith("crossattention") or "memory" in inputs]


def close(actual, expected, part=""):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5, msg=lambda message: f"{part}: {message}")


@pytest.mark.parametrize("name", WITH_PARTS)
def test_a_part_with_a_hook_is_called(name):
    module, inputs = make(name)
    module.eval()
    with torch.no_grad():
        expected = module(**inputs)
        for part in parts(module, inputs):
            changed, calls = copy.deepcopy(module), []
            CALLS["forward hook"](changed, part, calls)
            close(changed(**inputs), expected, part)
            assert set(calls) == {part}


@pytest.mark.parametrize("kind", [kind for kind in CALLS if kind != "forward hook"])
@pytest.mark.parametrize("name", FEW)
def test_every_part_is_called(name, kind):
    module, inputs = make(name)
    module.eval()
    changed, calls = copy.deepcopy(module), []
    names = parts(module, inputs)
    for part in sorted(names, key=lambda name: -name.count(".")):  # what is inside before it is wrapped
        CALLS[kind](changed, part, calls)
    with torch.no_grad():
        close(changed(**inputs), module(**inputs))
    assert set(calls) == set(names)


def layers(module, inputs):
    """The parts that are PyTorch layers with parameters."""
    return [name for name in parts(module, inputs) if module.get_submodule(name)._parameters.get("weight") is not None]


@pytest.mark.parametrize("name", WITH_PARTS)
@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_the_parts_compute_what_the_operators_do(name, mode):
    """With gradients, and under autocast."""
    module, inputs = make(name)
    module.train(mode == "training")
    changed, calls = copy.deepcopy(module), []
    for part in parts(module, inputs):
        CALLS["forward hook"](changed, part, calls)
    plain_result, plain_gradients = gradients(module, inputs)
    result, found = gradients(changed, inputs)
    close(result, plain_result)
    assert found.keys() == plain_gradients.keys()
    for key, gradient in found.items():
        assert relative(gradient, plain_gradients[key].double()) < 1e-4, key
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        narrow, expected = changed(**inputs), module(**inputs)
    assert narrow.dtype == expected.dtype
    assert relative(narrow, result.double()) < 3 * relative(expected, result.double()) + NOISE_FLOOR[torch.bfloat16]


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("name", FEW)
def test_backward_hooks_fire(name, kind):
    module, inputs = make(name)
    names, calls = layers(module, inputs), []
    _, expected = gradients(module, inputs)
    for part in names:
        GRADIENTS[kind](module, part, calls)
    _, found = gradients(module, inputs)
    assert set(calls) == set(names)
    for key, gradient in found.items():
        assert relative(gradient, expected[key].double()) < 1e-4, key


@pytest.mark.parametrize("name", NAMES)
def test_parameters_may_be_parametrised(name):
    module, inputs = make(name)
    module.eval()
    changed, calls = copy.deepcopy(module), []
    names = [part for part, found in module.named_modules() if list(found.parameters(recurse=False))]
    names = [part for part in names if not part.startswith("crossattention") or "memory" in inputs]
    for part in names:
        parametrisation(changed, part, calls)
    close(changed(**inputs), module(**inputs))
    assert set(calls) == set(names)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_may_be_substituted(name):
    module, inputs = make(name)
    module.eval()
    other = randomise(copy.deepcopy(module))
    with torch.no_grad():
        actual = torch.func.functional_call(module, dict(other.named_parameters()), kwargs=inputs)
        close(actual, other(**inputs))


@pytest.mark.parametrize("name", FEW)
def test_a_compiled_part_is_called(name):
    module, inputs = make(name)
    module.eval()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = module(**inputs)
        part = layers(module, inputs)[-1]
        calls = []
        compiled(module, part, calls)
        close(module(**inputs), expected)
    assert calls


def test_global_hooks_see_every_part():
    module, inputs = make("TemporalBlock")
    seen = set()
    handle = register_module_forward_hook(lambda part, *_: seen.add(part))
    try:
        module(**inputs)
    finally:
        handle.remove()
    assert {module.get_submodule(part) for part in parts(module, inputs)} <= seen


def test_the_input_projection_may_be_spectrally_normed():
    """Spectral norm is a hook that runs before the attention module."""
    torch.manual_seed(0)
    block = randomise(TemporalBlock(DIM, HEADS, temporal=False))
    x = torch.randn(2, 5, DIM)
    nn.utils.spectral_norm(block.attn, "in_proj_weight")
    with torch.no_grad():
        block(x)  # finds the vectors of the greatest singular value
    block.eval()
    weight = block.attn.in_proj_weight_orig
    vectors = block.attn.in_proj_weight_u, block.attn.in_proj_weight_v
    expected = copy.deepcopy(block)
    nn.utils.remove_spectral_norm(expected.attn, "in_proj_weight")
    with torch.no_grad():
        expected.attn.in_proj_weight.copy_(weight / (vectors[0] @ weight @ vectors[1]))
        close(block(x), expected(x))
