"""Calls that are too small to gain: how they are found, counted and computed."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import mplug2_fast as mf
from mplug2_fast.acceleration import gain, small, swap
from mplug2_fast.acceleration.small import STATE, SmallCalls, small_calls

LIMITS = gain.TooSmall(10, {torch.bfloat16: range(32, 100), torch.float32: range(50)})


@pytest.fixture(params=["native", "python"])
def way(request, monkeypatch):
    if request.param == "native":
        request.getfixturevalue("native_module")
    else:
        monkeypatch.setattr(small, "connected", lambda: None)
        monkeypatch.setattr(swap, "connected", lambda: None)
        swap._subclass.cache_clear()
    yield request.param
    swap._subclass.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("elements", [0, 9, 10, 31, 32, 49, 50, 99, 100])
def test_small_calls_are_those_of_the_limits(way, dtype, elements):
    calls = small_calls(LIMITS, bytearray(1))
    assert isinstance(calls, SmallCalls) == (way == "python")
    for x in (torch.zeros(elements, dtype=dtype), torch.zeros(1, elements, 1, dtype=dtype).transpose(0, 1)):
        assert calls.add(x) == LIMITS.has(x)
    assert calls.add(nn.Parameter(torch.zeros(elements), requires_grad=False)) == (elements < 50)


@pytest.mark.parametrize("other", [None, 3, "x", [torch.zeros(1)], torch.nn.Buffer(torch.zeros(1))], ids=repr)
def test_only_tensors_and_parameters_are_small(way, other):
    calls = small_calls(LIMITS, bytearray(1))
    assert calls.add(other) == (type(other) is torch.Tensor)


def test_tensors_elsewhere_are_small_by_the_limit_for_all_devices(way):
    calls = small_calls(LIMITS, bytearray(1))
    assert calls.add(torch.zeros(9, device="meta"))
    assert not calls.add(torch.zeros(10, device="meta"))


@pytest.mark.parametrize(
    "arguments",
    [(), (0, []), (0, ((1, 2),), False, bytearray(1)), (0, (3,), False, bytearray(1)), (0, (), False, b"1")],
    ids=repr,
)
def test_wrong_limits_are_refused(native_module, arguments):
    with pytest.raises(TypeError):
        native_module.SmallCalls(*arguments)


def test_more_types_than_there_is_room_for(native_module):
    with pytest.raises(ValueError, match="at most 4"):
        native_module.SmallCalls(0, ((1, 0, 1),) * 5, False, bytearray(1))


@pytest.mark.parametrize("function", ["small_linear", "small_layer_norm"])
def test_native_forwards_leave_what_is_not_swapped(native_module, function):
    assert small.connected() is native_module
    compute, plain, x = getattr(native_module, function), nn.Linear(4, 4), torch.zeros(1, 4)
    swapped = copy.deepcopy(plain)
    mf.accelerate(swapped)
    vars(plain)[STATE] = None
    for arguments in ((), (1, 2, 3), (plain, x, nn.Linear), (swapped, x, nn.Linear), (swapped, None, type(swapped))):
        assert compute(*arguments) is None


@pytest.mark.real_sizes
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.LayerNorm(8)], ids=["linear", "norm"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_small_calls_compute_and_count(way, make, copied):
    plain, x = make(), torch.randn(3, 8, requires_grad=True)
    fast = copy.deepcopy(plain)
    report = mf.accelerate(fast)
    assert torch.equal(fast(x), plain(x))
    assert torch.equal(fast(input=x), plain(x))
    assert torch.equal(torch.autograd.grad(fast(x).sum(), x)[0], torch.autograd.grad(plain(x).sum(), x)[0])
    assert report.calls[""].no_gain == 3
    again = copied(fast)
    assert torch.equal(again(x), plain(x))
    assert report.calls[""].no_gain == 3
    assert vars(again)[STATE].calls.no_gain == 1


@pytest.mark.real_sizes
@pytest.mark.parametrize(("name", "make"), [("linear", nn.Linear), ("layer_norm", lambda *_: nn.LayerNorm(8))])
def test_small_calls_use_a_replaced_function(way, monkeypatch, name, make):
    fast, x = make(8, 8), torch.randn(3, 8)
    mf.accelerate(fast)
    monkeypatch.setattr(F, name, lambda x, *_: x + 1)
    assert torch.equal(fast(x), x + 1)


@pytest.mark.real_sizes
@pytest.mark.parametrize(("name", "make"), [("linear", nn.Linear), ("layer_norm", lambda *_: nn.LayerNorm(8))])
def test_function_modes_see_small_calls(way, name, make):
    class Seen(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen, fast = [], make(8, 8)
    mf.accelerate(fast)
    with Seen():
        fast(torch.randn(3, 8))
    assert getattr(F, name) in seen


@pytest.mark.real_sizes
def test_an_error_of_a_small_call_is_that_of_the_original(way):
    plain, x = nn.Linear(8, 8), torch.randn(3, 7)
    fast = copy.deepcopy(plain)
    mf.accelerate(fast)
    with pytest.raises(RuntimeError) as expected:
        plain(x)
    with pytest.raises(RuntimeError) as found:
        fast(x)
    assert str(found.value) == str(expected.value)


class Cast(nn.LayerNorm):
    """As open_clip's."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


class Wide(nn.LayerNorm):
    """Computes in float32, as CLIP's."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


@pytest.mark.real_sizes
@pytest.mark.parametrize("kind", [Cast, Wide])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_small_calls_of_other_norms(way, kind, weights, dtype, autocast):
    plain, x = kind(8, dtype=weights), torch.randn(3, 8).to(dtype)
    nn.init.normal_(plain.weight)
    fast = copy.deepcopy(plain)
    mf.accelerate(fast)

    def outcome(call):
        with torch.autocast("cpu", enabled=autocast):
            try:
                return call()
            except RuntimeError as error:  # types that PyTorch does not mix
                return str(error)

    expected = outcome(lambda: plain(x))
    for call in (lambda: fast(x), lambda: fast(x=x)):
        found = outcome(call)
        assert found == expected if isinstance(expected, str) else torch.equal(found, expected)
        assert isinstance(expected, str) or found.dtype == expected.dtype
