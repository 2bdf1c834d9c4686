"""Weights and inputs that change between calls without PyTorch's version counter."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mplug2_fast as mf
from mplug2_fast.acceleration import cache
from mplug2_fast.acceleration.swap import STATE
from mplug2_fast.ops.checksum import matrix_checksum
from mplug2_fast.ops.runtime import onednn
from tests.acceleration.official import MPLUG2
from tests.acceleration.test_decoder import CASE, check, extended, tiled, words


@pytest.fixture
def decoders():
    """(original, accelerated)"""
    plain, fast = (MPLUG2.of(CASE).text_decoder for _ in range(2))
    mf.accelerate(fast)
    return plain, fast


@pytest.fixture(params=[True, False], ids=["checksums", "copies"])
def comparison(request, monkeypatch):
    """By checksums, or by copies if memory cannot be read, as on a GPU."""
    if request.param:
        request.getfixturevalue("native_module")
    else:
        monkeypatch.setattr(cache, "is_readable", lambda tensor: False)


def names(decoder):
    layer = decoder.bert.encoder.layer[0]
    return [f"bert.encoder.layer.0.{name}" for name, _ in layer.named_parameters()] + [
        f"cls.predictions.{name}" for name, _ in decoder.cls.predictions.named_parameters()
    ]


def write(decoder, name):
    decoder.get_parameter(name).detach().numpy()[...] *= 1.25


def goes_on(plain, fast, ids, memory):
    """Whether calls continue one another again if nothing changes."""
    for step in range(3):
        ids = extended(ids, torch.arange(6), 90 + step)
        counts = check(plain, fast, ids, memory)
    return counts["logits"] == 6 and counts["memory"] == 0


@pytest.mark.usefixtures("comparison")
def test_every_weight_may_change_between_steps(decoders):
    plain, fast = decoders
    memory, ids = tiled(2), words(6, 1)
    check(plain, fast, ids, memory)
    for step, name in enumerate(names(fast)):
        for decoder in decoders:
            write(decoder, name)
        ids = extended(ids, torch.arange(6), step)
        check(plain, fast, ids, memory)
    assert goes_on(plain, fast, ids, memory)


@pytest.mark.usefixtures("comparison")
def test_weights_swapped_and_swapped_back(decoders):
    """Results from before the swap are not reused when the first weights are back."""
    memory, ids = tiled(2), words(6, 1)
    own = {name: parameter.detach().clone() for name, parameter in decoders[0].named_parameters()}
    other = {name: value + 0.05 * torch.randn_like(value) for name, value in own.items()}
    for step, values in enumerate((own, other, own, own, other)):
        for decoder in decoders:
            for name, parameter in decoder.named_parameters():
                parameter.data.copy_(values[name])
        check(*decoders, ids, memory)
        ids = extended(ids, torch.arange(6), step)


@pytest.mark.usefixtures("comparison")
def test_a_memory_written_without_the_version_counter(decoders):
    memory, ids = tiled(2), words(6, 1)
    check(*decoders, ids, memory)
    for step, change in enumerate((memory.data.neg_, lambda: memory.numpy().__imul__(2), memory.data[0, 0].zero_)):
        change()
        ids = extended(ids, torch.arange(6), step)
        assert check(*decoders, ids, memory)["memory"] > 0
    assert goes_on(*decoders, ids, memory)


def test_a_mask_written_in_place(decoders):
    memory, ids, mask = tiled(2), words(6, 1), torch.ones(6, 11)
    for step in range(3):
        check(*decoders, ids, memory, mask)
        mask.numpy()[:, 10 - step] = 0
        ids = extended(ids, torch.arange(6), step)


def test_weights_created_in_inference_mode():
    with torch.inference_mode():
        decoders = [MPLUG2.of(CASE).text_decoder for _ in range(2)]
        mf.accelerate(decoders[1])
        memory, ids = tiled(2), words(6, 1)
        check(*decoders, ids, memory)
        ids = extended(ids, torch.arange(6), 0)
        assert check(*decoders, ids, memory)["memory"] == 0
        for decoder in decoders:
            decoder.bert.encoder.layer[1].crossattention.self.key.weight.mul_(2)
        check(*decoders, extended(ids, torch.arange(6), 1), memory)


def test_checksums_need_no_copies_of_weights(decoders, native_module):
    check(*decoders, words(6, 1), tiled(2))
    seen = vars(decoders[1])[STATE].session._seen
    assert all(record.weights._bytes == () for record in seen.videos.records.values())


def test_a_step_reads_only_the_weights_of_the_memory_a_second_time(decoders, native_module, monkeypatch):
    plain, fast = decoders
    memory, ids, read = tiled(2), words(6, 1), []
    check(plain, fast, ids, memory)
    monkeypatch.setattr("mplug2_fast.ops.checksum.matrix_checksum", lambda t: read.append(t) or matrix_checksum(t))
    assert check(plain, fast, extended(ids, torch.arange(6), 0), memory)["logits"] == 6
    inner = [layer.crossattention.self for layer in fast.bert.encoder.layer]
    expected = {weight.data_ptr() for each in inner for weight in (each.key.weight, each.value.weight)}
    assert {tensor.data_ptr() for tensor in read} == expected


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x, y):
        return self.inner(x, y, y, need_weights=False)[0]


@pytest.mark.parametrize("own", [True, False], ids=["own keys", "others' keys"])
def test_a_fused_weight_is_packed_whole_or_in_parts(monkeypatch, native_module, own):
    monkeypatch.setattr(onednn, "MUCH_WORK", 0)
    torch.manual_seed(0)
    module = Attention().eval()
    x = torch.randn(2, 300, 32)
    y = x if own else torch.randn(2, 280, 32)
    with torch.no_grad():
        for _ in range(3):
            expected = module(x, y)
            with mf.accelerated(module):
                for _ in range(2):
                    torch.testing.assert_close(module(x, y), expected, atol=1e-5, rtol=1e-4)
                weight = module.inner.in_proj_weight
                assert onednn.is_packed(weight) == own
                assert onednn.is_packed(weight[32:]) == (not own)
                weight.data.mul_(1.1)
                changed = module(x, y)
            torch.testing.assert_close(changed, module(x, y), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_training_and_evaluating_alternate(monkeypatch, native_module, options):
    monkeypatch.setattr(onednn, "MUCH_WORK", 0)
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64), torch.randn(600, 64)
    mf.accelerate(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(model(x), F.linear(x, model.weight, model.bias))
            assert onednn.is_packed(model.weight)
        model(x).square().mean().backward()
        optimizer.step()


@pytest.fixture
def mesh():
    """A mesh of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_training_and_evaluating_in_turn_with_fsdp(monkeypatch, native_module, mesh):
    """FSDP gathers weights into the same memory each time and restores the version counter."""
    fsdp = importlib.import_module("torch.distributed.fsdp")
    monkeypatch.setattr(onednn, "MUCH_WORK", 0)
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(600, 64)
    mf.accelerate(model)
    fsdp.fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        with torch.no_grad():
            weight, bias = (parameter.full_tensor() for parameter in model.parameters())
            torch.testing.assert_close(model(x), F.linear(x, weight, bias))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
