"""What every module guarantees: results and gradients of its twin, any leading axes, half precision, autocast, compiled
graphs, recomputed activations, frozen parameters, and equal training."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mplug2_fast.nn import MLP, CrossAttention, FusionLayer, LocalTemporal, SelfAttention
from mplug2_fast.ops.runtime.spec import NOISE_FLOOR
from tests.nn.cases import CASES, DIM, HEADS, by_official_name, frames_of, gradient, memory_of, randomise, text_config
from tests.tolerance import assert_close_enough, relative


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def cast(inputs, dtype):
    return {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def floating(inputs):
    return {name: value for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()}


def leaves(inputs):
    """The inputs with floating tensors as leaves that require gradients."""
    return {**inputs, **{name: value.detach().clone().requires_grad_() for name, value in floating(inputs).items()}}


def gradients(module, inputs, *, call=None):
    """The output, and the gradients of a fixed projection of it by names of inputs and official names of parameters."""
    module.zero_grad(set_to_none=True)
    inputs = leaves(inputs)
    out = (module if call is None else call)(**inputs)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype))
    found = {name: value.grad for name, value in floating(inputs).items()} | by_official_name(module, gradient)
    return out.detach(), found


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert relative(grad, other[1][name].double()) < 1e-5, name


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 1, 2), (0,)], ids=str)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_computes_what_its_twin_does_for_any_leading_axes(case, lead, mode):
    ours, twin = case.pair()
    inputs = case.inputs(*lead)
    with torch.set_grad_enabled(mode == "training"):
        actual = ours.train(mode == "training")(**inputs)
    assert actual.shape == inputs["x"].shape
    assert actual.is_contiguous()
    if actual.numel():
        with torch.no_grad():
            eager, exact = twin(**inputs), copy.deepcopy(twin).double()(**cast(inputs, torch.float64))
        assert_close_enough(actual, eager, exact, NOISE_FLOOR[torch.float32], "result")


def test_strided_inputs(case):
    ours, _ = case.pair()
    inputs = case.inputs(2)
    strided = {
        name: torch.stack([v, torch.full_like(v, 3)], dim=-1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
        for name, v in floating(inputs).items()
    }
    torch.testing.assert_close(ours(**{**inputs, **strided}), ours(**inputs), atol=1e-5, rtol=1e-5)


def test_gradients(case):
    ours, twin = case.pair()
    inputs = case.inputs(2)
    _, actual = gradients(ours, inputs)
    _, eager = gradients(twin, inputs)
    _, exact = gradients(copy.deepcopy(twin).double(), cast(inputs, torch.float64))
    assert actual.keys() == exact.keys()
    for name in exact:
        assert_close_enough(actual[name], eager[name], exact[name], NOISE_FLOOR[torch.float32], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters(case, dtype):
    ours, twin = (module.to(dtype) for module in case.pair())
    inputs = cast(case.inputs(2), dtype)
    exact = copy.deepcopy(twin).double()(**cast(inputs, torch.float64)).detach()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            actual, eager = ours(**inputs).detach(), twin(**inputs).detach()
        assert actual.dtype == dtype
        assert_close_enough(actual, eager, exact, NOISE_FLOOR[dtype], f"grad {grad}")


def test_autocast(case):
    """Products are narrow, sums are wide where PyTorch's are, parameters and gradients keep their types."""
    ours, twin = case.pair()
    inputs = case.inputs(2)
    exact, exact_gradients = gradients(copy.deepcopy(twin).double(), cast(inputs, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        (actual, actual_gradients), (eager, eager_gradients) = (gradients(module, inputs) for module in (ours, twin))
        with torch.no_grad():
            inference = ours(**inputs)
    assert actual.dtype == inference.dtype
    if not any(isinstance(module, LocalTemporal) for module in ours.modules()):  # its operator adds the residual itself
        assert actual.dtype == eager.dtype
    floor = NOISE_FLOOR[torch.bfloat16]
    assert_close_enough(actual, eager, exact, floor, "training")
    assert_close_enough(inference, eager, exact, floor, "inference")
    for name, grad in exact_gradients.items():
        assert actual_gradients[name].dtype == torch.float32
        found = (without_key_bias(name, g) for g in (actual_gradients[name], eager_gradients[name], grad))
        assert_close_enough(*found, floor, name)


def test_compiles_to_one_graph_for_training_and_inference(case):
    ours, _ = case.pair()
    inputs = case.inputs(2)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(gradients(ours, inputs, call=compiled), gradients(ours, inputs))
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), ours(**inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_dropout_is_the_same(use_reentrant):
    torch.manual_seed(0)
    layer, x = randomise(FusionLayer.from_config(text_config(0.3, 0.3))), torch.randn(2, 7, DIM)
    memory = memory_of(2)["memory"]

    def recomputed(x, memory):
        return checkpoint(lambda *given: layer(given[0], memory=given[1]), x, memory, use_reentrant=use_reentrant)

    results = []
    for call in (layer, recomputed):
        torch.manual_seed(1)
        results.append(gradients(layer, {"x": x, "memory": memory}, call=call))
    assert_same(*results)


def test_frozen_parameters_get_no_gradients_and_do_not_affect_others(case):
    ours, _ = case.pair()
    inputs = case.inputs(2)
    _, expected = gradients(ours, inputs)
    direction = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(7))
    whole = {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}
    for chosen, parameter in ours.named_parameters():
        ours.requires_grad_(False).zero_grad(set_to_none=True)
        parameter.requires_grad_()
        ours(**inputs).backward(direction)
        assert [name for name, p in ours.named_parameters() if p.grad is not None] == [chosen]
        assert relative(parameter.grad, whole[chosen].double()) < 1e-5, chosen
    ours.requires_grad_(False)
    asking = leaves(inputs)
    ours(**asking).backward(direction)
    for name in floating(inputs):
        assert relative(asking[name].grad, expected[name].double()) < 1e-5, name
    assert not ours(**inputs).requires_grad


def without_key_bias(name, parameter):
    """A bias on keys shifts all scores of a query equally, which the softmax ignores. Its gradient is only rounding
    noise, which AdamW turns into steps."""
    if name.endswith("in_proj_bias"):
        return torch.cat([parameter[:DIM], parameter[2 * DIM :]])
    return parameter[:0] if name.endswith("key.bias") else parameter


def test_compiled_by_the_default_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = CASES["TemporalBlock"].pair()[0]
    compiled = torch.compile(block, fullgraph=True)
    inputs = frames_of(2)
    assert_same(gradients(block, inputs, call=compiled), gradients(block, inputs))


@pytest.mark.parametrize("kind", [SelfAttention, CrossAttention])
def test_dropout_of_attention_drops_weights_when_training(kind):
    """If everything is dropped, only the output's bias is left."""
    module, x = randomise(kind(DIM, HEADS, dropout=1.0)), torch.randn(2, 7, DIM)
    inputs = (x,) if kind is SelfAttention else (x, torch.randn(2, 9, DIM))
    torch.testing.assert_close(module(*inputs), module.out_proj.bias.expand_as(x))
    assert not torch.allclose(module.eval()(*inputs), module.out_proj.bias.expand_as(x))


def test_mlp_with_a_norm_before_it():
    module, norm, x = MLP(8, 20, "gelu"), torch.nn.LayerNorm(8), torch.randn(3, 8)
    plain = module.c_proj(torch.nn.functional.gelu(module.c_fc(norm(x))))
    torch.testing.assert_close(module(x, norm=norm), plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(module(x, norm=norm, residual=True), x + plain, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="weight and a bias"):
        module(x, norm=torch.nn.LayerNorm(8, elementwise_affine=False))
