"""Accelerated modules under torch's own tools: compilers, transforms, modes, tensor subclasses, parallelism."""

import copy
import inspect
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import nn

import mplug2_fast as mf
from mplug2_fast.acceleration.swap import STATE
from tests.acceleration import official_vision
from tests.golden.cases import relative_error


class Net(nn.Module):
    """A network with every basic kind of module, and its own signature."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(16, 32), gelu=nn.GELU(), c_proj=nn.Linear(32, 16)))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, hidden_states, scale: float = 1.0):
        x = self.norm(self.first(hidden_states)) * scale
        return self.mlp(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def fast(plain):
    fast = copy.deepcopy(plain)
    assert len(mf.accelerate(fast).replaced) == 6
    return fast


@pytest.fixture
def x():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def test_symbolic_trace(plain, fast, x):
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(fast.mlp)(x), plain.mlp(x))


class Tagged(torch.Tensor):
    """A tensor subclass that implements nothing."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_of_a_subclass(plain, x, when):
    fast = copy.deepcopy(plain)
    if when == "after":
        report = mf.accelerate(fast)
    fast.mlp.c_fc.weight = nn.Parameter(fast.mlp.c_fc.weight.detach().as_subclass(Tagged), requires_grad=False)
    assert type(fast.mlp.c_fc.weight) is Tagged
    if when == "before":
        report = mf.accelerate(fast)
        entries = {entry.path: entry for entry in report.entries}
        assert entries["mlp.c_fc"].reason == "weight is a Tagged"
        assert entries["mlp.c_proj"].replacement == "FastLinear"
    with torch.no_grad():
        torch.testing.assert_close(torch.Tensor(fast(x)), plain(x))
    if when == "after":
        assert dict(report.calls["mlp"].by_parts) == {"a weight is a Tagged": 1}
        assert dict(report.calls["mlp.c_fc"].original) == {"a weight is a Tagged": 1}


def test_inputs_of_a_subclass(plain, fast, x):
    with torch.no_grad():
        torch.testing.assert_close(torch.Tensor(fast(x.as_subclass(Tagged))), plain(x))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_distributed_weights_are_left(plain, x, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    fast = copy.deepcopy(plain)
    parallelize_module(fast.mlp, mesh, {"c_fc": ColwiseParallel(), "c_proj": RowwiseParallel()})
    reasons = {entry.path: entry.reason for entry in mf.accelerate(fast).left}
    assert reasons["mlp.c_fc"] == "weight is a DTensor"
    with torch.no_grad():
        torch.testing.assert_close(fast.mlp(x), plain.mlp(x))


def test_restored_modules_stay_sharded(plain, fast, x, mesh):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for part in (fast.mlp, fast):
        fully_shard(part, mesh=mesh)
    mf.restore(fast)
    assert isinstance(fast.mlp, FSDPModule)
    assert type(fast.mlp).__mro__[2] is nn.Sequential
    assert not any(hasattr(module, STATE) for module in fast.modules())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x))


def test_names_and_signatures_are_those_of_the_original(plain, fast):
    for ours, theirs in zip(fast.modules(), plain.modules(), strict=True):
        kind, original = type(ours), type(theirs)
        assert isinstance(ours, original)
        assert (kind.__name__, kind.__qualname__, kind.__module__) == (
            original.__name__,
            original.__qualname__,
            original.__module__,
        )
        assert str(kind) == str(original)
        assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
        assert ours.forward.__doc__ == theirs.forward.__doc__
    assert repr(fast) == repr(plain)
    block = official_vision.TemporalBlock(64, 1)
    names = list(inspect.signature(block.forward).parameters)
    mf.accelerate(block)
    assert list(inspect.signature(block.forward).parameters) == names


def test_keyword_arguments(plain, fast, x):
    with torch.no_grad():
        for model in (plain, fast):
            model.forward(scale=2.0, hidden_states=x)
        assert relative_error(fast.first(input=x), plain.first(input=x)) < 1e-5
        assert relative_error(fast.norm(input=x), plain.norm(input=x)) < 1e-5
        assert relative_error(fast.mlp(input=x), plain.mlp(input=x)) < 1e-5


def test_wrong_arguments_fail_as_before(plain, fast, x):
    for model in (plain, fast):
        with pytest.raises(TypeError):
            model.first()
        with pytest.raises(TypeError):
            model.norm(x, x)
        with pytest.raises(RuntimeError):
            model.first(x[..., :3])
        with pytest.raises((TypeError, AttributeError)):
            model.mlp(None)
