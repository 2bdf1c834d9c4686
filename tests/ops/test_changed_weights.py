"""Packed weights that change: results always follow from the current weight, however it was written."""

import copy
import ctypes
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mplug2_fast import ops
from mplug2_fast.ops.runtime import onednn

pytestmark = pytest.mark.usefixtures("native_module", "every_product_pays")
ROWS = 80


@pytest.fixture
def every_product_pays(monkeypatch):
    monkeypatch.setattr(onednn, "MANY_ROWS", ROWS)
    monkeypatch.setattr(onednn, "MUCH_WORK", 0)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    made = nn.Linear(32, 48)
    onednn.pack(made.weight, ROWS)
    check(made)
    return made


@torch.no_grad()
def check(layer, packed=True):
    x = torch.randn(ROWS, layer.weight.shape[1]).to(layer.weight.dtype)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(ops.linear_act(x, layer.weight, layer.bias), expected)
    torch.testing.assert_close(ops.linear_act(x, layer.weight[:16]), F.linear(x, layer.weight[:16]))
    assert onednn.is_packed(layer.weight) == packed


def step(optimizer, **options):
    def write(layer):
        made = optimizer(layer.parameters(), lr=0.1, **options)
        for _ in range(2):
            layer(torch.randn(3, 32)).square().sum().backward()
            made.step()

    return write


def through_memory(layer):
    weight = layer.weight
    values = (ctypes.c_float * weight.numel()).from_address(weight.data_ptr())
    values[7] = 100.0


def through_a_view_of_bytes(layer):
    view = memoryview(layer.weight.detach().numpy()).cast("B").cast("f")
    view[9] = 100.0


def swapped(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(48, 32)))


def preserving_the_count(layer):
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(layer.weight):
        layer.weight.mul_(2)


@torch.no_grad()
def in_place(layer):
    layer.weight.mul_(2)


@torch.no_grad()
def set_to_another(layer):
    layer.weight.set_(torch.randn(48, 32))


WRITES = {
    "in place": in_place,
    "AdamW": step(torch.optim.AdamW),
    "fused AdamW": step(torch.optim.AdamW, fused=True),
    "fused Adam": step(torch.optim.Adam, fused=True),
    "fused SGD": step(torch.optim.SGD, fused=True),
    "fused Adagrad": step(torch.optim.Adagrad, fused=True),
    "data.copy_": lambda layer: layer.weight.data.copy_(torch.randn(48, 32)),
    "data += delta, as adapters are merged": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
    "data.add_": lambda layer: layer.weight.data.add_(1),
    "data.neg_": lambda layer: layer.weight.data.neg_(),
    "one value": lambda layer: layer.weight.data[47, 31].fill_(100),
    "rows swapped": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),
    "NumPy": lambda layer: layer.weight.detach().numpy().__imul__(2),
    "memoryview": through_a_view_of_bytes,
    "DLPack": lambda layer: torch.from_dlpack(layer.weight.detach()).mul_(2),
    "ctypes": through_memory,
    "storage": lambda layer: layer.weight.untyped_storage().copy_(torch.randn(48, 32).untyped_storage()),
    "set_": set_to_another,
    "swap_tensors": swapped,
    "uncounted, as FSDP2 gathers": preserving_the_count,
    "load_state_dict": lambda layer: layer.load_state_dict(nn.Linear(32, 48).state_dict()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_way_to_write(layer, write):
    before = layer.weight.detach().clone()
    write(layer)
    assert not torch.equal(before, layer.weight)
    check(layer, packed=write is not swapped)
    write(layer)
    check(layer, packed=write is not swapped)


def test_copies_and_files_are_unpacked(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        check(other, packed=False)
    assert list(layer.state_dict()) == ["weight", "bias"]
    ops.unpack_weight(layer.weight)
    check(layer, packed=False)


def test_weights_that_are_replaced(layer):
    layer.load_state_dict(nn.Linear(32, 48).state_dict(), assign=True)
    check(layer, packed=False)


def test_another_shape_layout_or_type(layer):
    square = nn.Linear(32, 32)
    onednn.pack(square.weight, ROWS)
    square.weight.data = square.weight.data.t()
    check(square, packed=False)
    layer.weight.data, layer.bias.data = torch.randn(16, 64), torch.randn(16)
    check(layer, packed=False)
    onednn.pack(layer.weight, ROWS)
    layer.to(torch.bfloat16)
    assert onednn.packed(layer.weight) is None or onednn.packed(layer.weight).dtype == torch.bfloat16
    layer.float()
    check(layer)


def test_swapped_out_and_in_again(layer):
    """A moving average replaces the weights for an evaluation."""
    training, average = layer.weight.detach().clone(), torch.randn(48, 32)
    for values in (average, training, average, training):
        layer.weight.data.copy_(values)
        check(layer)
        assert torch.equal(layer.weight, values)


def test_a_weight_that_stays_is_packed_once(layer):
    first = onednn.packed(layer.weight)
    check(layer)
    assert onednn.packed(layer.weight) is first
    layer.weight.data.add_(0)
    assert onednn.packed(layer.weight) is first
    layer.weight.data.add_(1)
    assert onednn.packed(layer.weight) is not first


def test_another_weight_at_the_same_address():
    memory = torch.randn(48 * 32)
    for _ in range(3):
        layer = nn.Linear(32, 48)
        layer.weight = nn.Parameter(torch.from_numpy(memory.numpy()).view(48, 32))
        onednn.pack(layer.weight, ROWS)
        check(layer)
        del layer
        memory.normal_()


def test_tied_weights(layer):
    other = nn.Linear(32, 48)
    other.weight = nn.Parameter(layer.weight.data)
    onednn.pack(other.weight, ROWS)
    other.weight.data.mul_(2)
    check(layer)
    check(other)


def test_a_weight_of_inference_mode():
    with torch.inference_mode():
        layer = nn.Linear(32, 48)
        onednn.pack(layer.weight, ROWS)
        check(layer)
        layer.weight.mul_(2)
        check(layer)
    check(layer)


def test_parts_of_a_weight(layer):
    with torch.no_grad():
        x, weight = torch.randn(ROWS, 32), layer.weight
        for part in (weight[:16], weight[16:]):
            onednn.pack(part, ROWS)
        assert [onednn.is_packed(each) for each in (weight, weight[:16], weight[16:])] == [False, True, True]
        for _ in range(2):
            for part in (weight[:16], weight[16:], weight[:17], weight):
                torch.testing.assert_close(ops.linear_act(x, part), F.linear(x, part))
            weight.data[20].add_(1)
        onednn.pack(weight, ROWS)  # in place of its parts
        assert [onednn.is_packed(each) for each in (weight, weight[:16], weight[16:])] == [True, False, False]
        onednn.unpack(weight[16:])
        assert not onednn.is_packed(weight)


def test_memory_does_not_grow(layer):
    weight = layer.weight
    with torch.no_grad():
        for begin in range(30):
            onednn.pack(weight[begin : begin + 16], ROWS)
        assert sum(onednn.is_packed(weight[begin : begin + 16]) for begin in range(30)) <= 48 // 16


@pytest.mark.parametrize(
    "weight", [torch.randn(64, 48)[:, ::2], torch.randn(64, 48).expand(64, 48)[::2]], ids=["columns", "rows"]
)
def test_memory_with_gaps_is_left_alone(weight):
    onednn.pack(weight, ROWS)
    assert not onednn.is_packed(weight)


def test_too_small_products_take_the_plain_weight(layer, monkeypatch):
    monkeypatch.setattr(onednn, "checksum", None)
    with torch.no_grad():
        x = torch.randn(ROWS - 1, 32)
        torch.testing.assert_close(ops.linear_act(x, layer.weight), F.linear(x, layer.weight))


@pytest.mark.parametrize("name", ["mlp", "local_temporal"])
def test_operators_of_several_products(name):
    op = ops.OPERATORS[name]
    sizes = (
        {"rows": (90,), "channels": 16, "hidden": 48}
        if name == "mlp"
        else {"batch": 1, "frames": 5, "patches": 24, "channels": 32, "inner": 16}
    )
    given = op.op.spec.inputs(sizes, torch.float32)
    weights = [value for key, value in given.items() if key in ("fc_weight", "proj_weight", "down_weight", "up_weight")]
    with torch.no_grad(), ops.use_backend("cpu"):
        for weight in weights:
            onednn.pack(weight, ROWS)
        for _ in range(2):
            torch.testing.assert_close(op.op(*given.values()), op.op.spec.reference(**given), atol=1e-5, rtol=1e-4)
            for weight in weights:
                weight.numpy()[...] *= 1.5


def test_a_compiled_product_reads_the_weight_as_it_is(layer):
    compiled = torch.compile(lambda x: ops.linear_act(x, layer.weight, layer.bias), backend="aot_eager", fullgraph=True)
    x = torch.randn(ROWS, 32)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), layer(x))
            layer.weight.data.add_(1)
