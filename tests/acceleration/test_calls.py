"""Calls of accelerated modules: served, by parts or by the original code, and their counts in the report."""

import copy
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import mplug2_fast as mf
from mplug2_fast.acceleration import gain
from mplug2_fast.ops.runtime import onednn
from tests.acceleration import official_vision
from tests.golden.cases import relative_error


def clip_mlp():
    return nn.Sequential(OrderedDict(c_fc=nn.Linear(64, 128), gelu=nn.GELU(), c_proj=nn.Linear(128, 64))).eval()


def block():
    torch.manual_seed(0)
    return official_vision.TemporalBlock(64, 1).eval()


@torch.no_grad()
def compare(module, x, *args):
    """Checks a call of the accelerated module against the original, and returns the report."""
    plain = copy.deepcopy(module)
    report = mf.accelerate(module)
    assert relative_error(module(x, *args), plain(x, *args)) < 1e-5
    return report


def test_served_calls_are_counted():
    module, x = block(), torch.randn(5, 4, 64)
    report = compare(module, x, 2)
    assert str(report) == "(the model)  TemporalBlock  → FastTemporalBlock (served 1)"
    assert report.calls[""].served == 1
    assert not report.calls["attn"]
    with torch.no_grad():
        module(x, 2)
    assert str(report.calls[""]) == "served 2"


def test_an_unserved_call_runs_with_accelerated_parts():
    module, x = block(), torch.randn(5, 4, 64)
    report = compare(module, x, 2)
    handle = module.ln_1.register_forward_hook(lambda _, __, out: 2 * out)
    expected = block()
    expected.load_state_dict(module.state_dict())
    expected.ln_1.register_forward_hook(lambda _, __, out: 2 * out)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert relative_error(module(x, 2), expected(x, 2)) < 1e-5
    assert len(caught) == 1
    assert "ln_1 has a hook or its own forward" in str(caught[0].message)
    assert dict(report.calls[""].by_parts) == {"ln_1 has a hook or its own forward": 2}
    assert report.calls["attn"].served == report.calls["mlp"].served == 2
    assert "served 1, by parts 2 (ln_1 has a hook" in str(report)
    handle.remove()
    with torch.no_grad():
        module(x, 2)
    assert report.calls[""].served == 2


@pytest.mark.real_sizes
def test_small_calls_run_the_original_code():
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    x = torch.randn(1, 64)
    expected = module(x)
    report = mf.accelerate(module)
    with torch.no_grad():
        assert torch.equal(module(x), expected)
    assert str(report).splitlines() == [
        "0  Linear     → FastLinear (served 0, no gain 1)",
        "1  LayerNorm  → FastLayerNorm (served 0, no gain 1)",
    ]


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.5)


def attribute(module):
    ones = torch.ones_like(module.weight).detach()
    del module.weight
    object.__setattr__(module, "weight", ones)


def derived(module):
    module.__class__ = type("Derived", (type(module),), {"bias": property(lambda self: torch.ones(8))})


@pytest.mark.real_sizes
@pytest.mark.parametrize("change", [pruned, attribute, derived], ids=lambda change: change.__name__)
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.LayerNorm(8)], ids=["linear", "norm"])
def test_small_calls_use_what_replaced_a_parameter(make, change):
    plain, x = make(), torch.randn(3, 8)
    fast = copy.deepcopy(plain)
    report = mf.accelerate(fast)
    for module in (plain, fast):
        change(module)
    assert torch.equal(fast(x), plain(x))
    assert torch.equal(fast(input=x), plain(input=x))
    assert report.calls[""].no_gain == 2


@pytest.mark.real_sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_calls_are_served(dtype):
    norm, x = nn.LayerNorm(1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    report = mf.accelerate(norm)
    with torch.no_grad():
        norm(x)
    assert report.calls[""].served == 1


@pytest.mark.real_sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [gain.Size(64, 64 * 64), gain.Size(3072, 3072 * 768)], ids=str)
def test_the_quick_check_of_small_inputs_agrees_with_the_exact_one(dtype, size):
    small, x = gain.small_for_product(size), torch.empty(1, dtype=dtype)
    row = size.elements // size.outputs
    for elements in (1, row, 16 * row, 16 * row + 1, 100 * row, *(small.on_cpu.get(dtype, range(0))[-1:])):
        for near in (elements, elements + 1):
            known = small.has(x.expand(near))
            assert not (known and gain.of_product(x.expand(near), size))
            assert known or dtype not in small.on_cpu or gain.of_product(x.expand(near), size)


@pytest.mark.real_sizes
@pytest.mark.parametrize(("rows", "served"), [(1, True), (16, True), (17, False)])
def test_few_rows_in_bfloat16_are_served(native_module, rows, served):
    if not onednn.multiplies(torch.bfloat16):
        pytest.skip("this processor widens bfloat16")
    linear, x = nn.Linear(192, 192, dtype=torch.bfloat16), torch.randn(rows, 192, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = linear(x)
        report = mf.accelerate(linear)
        assert relative_error(linear(x), expected) < 1e-2
    assert bool(report.calls[""].served) == served


@pytest.mark.real_sizes
@pytest.mark.parametrize(("channels", "served"), [(192, 2), (768, 3)])
def test_few_rows_after_many_are_served_if_the_weight_is_large(native_module, channels, served):
    """A kernel that ran long ago takes longer."""
    if not onednn.multiplies(torch.bfloat16):
        pytest.skip("this processor widens bfloat16")
    layers = nn.ModuleList([nn.Linear(192, 192), nn.Linear(channels, channels)]).to(torch.bfloat16)
    report = mf.accelerate(layers)
    with torch.no_grad():
        layers[0](torch.randn(100, 192, dtype=torch.bfloat16))
        for _ in range(3):
            layers[1](torch.randn(2, channels, dtype=torch.bfloat16))
    assert report.calls["1"].served == served


@pytest.mark.real_sizes
def test_gradients_on_a_cpu_run_the_original_code():
    module, x = clip_mlp(), torch.randn(9, 64)
    report = mf.accelerate(module)
    module(x).sum().backward()
    assert report.calls[""].served == 0
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_copies_count_for_themselves():
    module, x = clip_mlp(), torch.randn(9, 64)
    report = mf.accelerate(module)
    with torch.no_grad():
        module(x)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            own = mf.accelerate(other)
            assert own.calls[""].served == 0
            assert torch.equal(other(x), module(x))
            assert own.calls[""].served == 1
            assert own.calls["c_fc"].served == 0
    assert report.calls[""].served == 3


# --- what is put on a part


def scaled(module):
    module.c_proj.register_forward_hook(lambda _, __, out: 0 * out)


def weight_normed(module):
    parametrizations.weight_norm(module.c_fc)
    module.c_fc.parametrizations.weight.original0.data *= 2


def replaced(module):
    torch.manual_seed(1)
    module.c_fc = nn.Sequential(nn.Linear(64, 128), nn.Identity())


def own_forward(module):
    module.c_fc.forward = lambda x: torch.zeros(*x.shape[:-1], 128)


CHANGES = [scaled, weight_normed, replaced, own_forward]


@pytest.mark.unserved_calls
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_parts_count(change, when):
    torch.manual_seed(0)
    plain, x = clip_mlp(), torch.randn(9, 64)
    fast = copy.deepcopy(plain)
    if when == "after":
        mf.accelerate(fast)
    for module in (plain, fast):
        torch.manual_seed(0)
        change(module.eval())
    if when == "before":
        mf.accelerate(fast)
    with torch.no_grad():
        before = plain(x)
        assert relative_error(fast(x), before) < 1e-5 or torch.equal(fast(x), before)
    plain(x).square().sum().backward()
    fast(x).square().sum().backward()
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    mf.restore(fast)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), before)


@pytest.mark.unserved_calls
def test_a_parametrised_module():
    linear, x = nn.Linear(64, 64), torch.randn(600, 64)
    mf.accelerate(linear)
    parametrizations.weight_norm(linear)
    with torch.no_grad():
        linear.parametrizations.weight.original0.mul_(3)
        expected = nn.functional.linear(x, linear.weight, linear.bias)
        assert relative_error(linear(x), expected) < 1e-5
        mf.restore(linear)
        assert torch.equal(linear(x), expected)
    assert "parametrizations" in linear._modules


@pytest.mark.unserved_calls
def test_dropout_of_a_mlp_draws_the_same_numbers():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.drop, self.fc2 = nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 8)

        def forward(self, x):
            return self.fc2(self.drop(self.act(self.fc1(x))))

    module, x = Mlp().eval(), torch.randn(3, 8)
    assert compare(module, x).calls[""].served == 1
    plain = Mlp()
    plain.load_state_dict(module.state_dict())
    for m in (module, plain):
        m.train()
        torch.manual_seed(0)
    with torch.no_grad():
        expected = plain(x)
        torch.manual_seed(0)
        torch.testing.assert_close(module(x), expected)


# --- wrappers


def checkpointed(module):
    """Checkpoints a module with a forward on the instance, as fairscale does."""
    import functools
    import weakref

    from torch.utils.checkpoint import checkpoint

    def run(forward, this, offload, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(this(), *args, **kwargs)
        return checkpoint(functools.partial(forward, this()), *args, use_reentrant=False, **kwargs)

    module.forward = functools.partial(run, type(module).forward, weakref.ref(module), False)
    return module


def torch_checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


@pytest.mark.parametrize("wrap", [checkpointed, torch_checkpointed], ids=lambda wrap: wrap.__name__)
def test_checkpointed_blocks(wrap):
    plain, x = block(), torch.randn(5, 4, 64, requires_grad=True)
    module = nn.ModuleDict({"block": wrap(copy.deepcopy(plain))})
    report = mf.accelerate(module)
    (found,) = [entry for entry in report.replaced if entry.part_of is None]
    assert found.replacement == "FastTemporalBlock"
    with torch.no_grad():
        assert relative_error(module["block"](x, 2), plain(x, 2)) < 1e-5
    assert report.calls[found.path].served == 1
    ours = torch.autograd.grad(module["block"](x, 2).square().sum(), x)[0]
    assert report.calls[found.path].served >= 2
    assert relative_error(ours, torch.autograd.grad(plain(x, 2).square().sum(), x)[0]) < 1e-4
    mf.restore(module)
    with torch.no_grad():
        assert torch.equal(module["block"](x, 2), plain(x, 2))


# --- norms whose class casts


class Casting(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.type(torch.float32)).type(x.dtype)


class CastingBack(nn.LayerNorm):
    def forward(self, x):
        out = nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return out.to(x.dtype)


class WithoutEps(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias)


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


class Rounding(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.bfloat16().float()) if x.dtype is torch.float16 else super().forward(x)


@pytest.mark.parametrize("kind", [Casting, CastingBack, Rounding], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.unserved_calls
def test_norms_that_cast(kind, given, parameters):
    norm, x = kind(96).to(parameters), torch.randn(2, 5, 96).to(given) * 3 + 1
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
        try:
            expected = norm(x)
        except RuntimeError:
            expected = None
        report = mf.accelerate(norm)
        assert report.replaced
        if expected is None:
            with pytest.raises(RuntimeError):
                norm(x)
            return
        out = norm(x)
    assert out.dtype is expected.dtype
    torch.testing.assert_close(out, expected, rtol=1e-2 if given is torch.bfloat16 else 2e-3, atol=1e-2)
    if parameters is given or (kind is Casting and parameters is torch.float32):
        assert report.calls[""].served == (kind is not Rounding or given is torch.float32)


def test_norms_that_compute_something_else():
    for norm in (WithoutEps(8, eps=0.1), ChannelsFirst(8)):
        (entry,) = mf.accelerate(norm).entries
        assert entry.replacement is None
        assert "LayerNorm on a trial input" in entry.reason or "fails on a trial input" in entry.reason
    assert mf.accelerate(WithoutEps(8)).replaced  # the default is the same
