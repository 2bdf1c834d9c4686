"""Checksums: every change of memory shows, and nothing else counts."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mplug2_fast.ops import linear_act, mlp
from mplug2_fast.ops.checksum import checksum, is_readable, matrix_checksum, reading_weights
from mplug2_fast.ops.runtime import cpu

pytestmark = pytest.mark.usefixtures("native_module")
BLOCK, CHUNK = 256, 128 * 1024
"""Bytes of a block, and of a chunk that one thread hashes."""


def hashed(data, begin=0, end=None):
    """The checksum of bytes at any address."""
    part = data[begin:end]
    return cpu.module().checksum(cpu.isa(), 1, [(part.data_ptr(), part.numel())])


def random_bytes(size, seed=0):
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_every_bit_counts():
    data = random_bytes(3 * BLOCK)
    before = hashed(data)
    seen = {before}
    for byte, bit in itertools.product(range(BLOCK, 2 * BLOCK), range(8)):
        data[byte] ^= 1 << bit
        seen.add(hashed(data))
        data[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * BLOCK
    assert hashed(data) == before


@pytest.mark.parametrize("value", [0, 255])
def test_every_byte_of_a_tail_counts_and_so_does_its_length(value):
    data = torch.full((BLOCK + 255,), value, dtype=torch.uint8)
    seen = set()
    for size in (*range(256), *range(BLOCK, BLOCK + 256)):
        seen.add(hashed(data, end=size))
        if size:
            data[size - 1] ^= 1
            seen.add(hashed(data, end=size))
            data[size - 1] ^= 1
    assert len(seen) == 2 * 512 - 1


def test_any_address():
    data, before = random_bytes(3000), hashed(random_bytes(3000)[:1000])
    for begin in range(1, 65):
        moved = torch.cat([random_bytes(begin, seed=1), data[:1000]])
        assert hashed(moved, begin) == before


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_instruction_sets_and_threads_do_not_count(size):
    data, module = random_bytes(size), cpu.module()
    isas = [isa for isa in module.Isa.__members__.values() if module.is_supported(isa)]
    pieces = [(data.data_ptr(), size)]
    assert len({module.checksum(isa, threads, pieces) for isa in isas for threads in (1, 2, 7)}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (63, 33), (64, 128), (65, 200), (300, 17), (500, 512)])
def test_products_hash_the_weights_that_they_read(monkeypatch, outputs, inputs, dtype):
    generator, module = torch.Generator().manual_seed(0), cpu.module()
    weight, x = (torch.randn(rows, inputs, generator=generator).to(dtype) for rows in (outputs, 5))
    expected = matrix_checksum(weight)
    monkeypatch.setattr("mplug2_fast.ops.checksum.matrix_checksum", None)  # not called
    for isa in filter(module.is_supported, module.Isa.__members__.values()):
        for threads in (1, 3):
            monkeypatch.setattr(cpu, "isa", lambda isa=isa: isa)
            monkeypatch.setattr(cpu, "threads", lambda work, threads=threads: threads)
            with reading_weights() as read:
                result = linear_act(x, weight)
            assert read.checksum(weight) == expected
            assert torch.equal(result, linear_act(x, weight))


def test_products_with_many_rows_do_not_hash_their_weights():
    x, fc, proj = torch.randn(65, 8), torch.randn(16, 8), torch.randn(8, 16)
    with reading_weights() as read:
        mlp(x, fc, None, proj, None, activation="gelu")
        assert read._found == {}
        mlp(x[:64], fc, None, proj, None, activation="gelu")
        assert len(read._found) == 2
    linear_act(x[:1], torch.randn(3, 8))
    assert len(read._found) == 2
    assert [read.checksum(w) for w in (fc, proj)] == [matrix_checksum(w) for w in (fc, proj)]


CHANGES = {
    "negated": lambda w: w.neg_(),
    "one row negated": lambda w: w[5].neg_(),
    "two values negated": lambda w: w.view(-1)[3:132:128].neg_(),
    "a column negated": lambda w: w[:, 7].neg_(),
    "every pair of rows negated": lambda w: w[::2].neg_(),
    "a constant added": lambda w: w.add_(1e-3),
    "scaled": lambda w: w.mul_(2),
    "zeroed": lambda w: w.zero_(),
    "one row zeroed": lambda w: w[-1].zero_(),
    "rows reversed": lambda w: w.copy_(w.flip(0)),
    "columns reversed": lambda w: w.copy_(w.flip(1)),
    "rows rotated": lambda w: w.copy_(w.roll(1, 0)),
    "values rotated": lambda w: w.copy_(w.roll(1, 1)),
    "two rows swapped": lambda w: w[:2].copy_(w[:2].flip(0)),
    "neighbours swapped": lambda w: w.view(-1)[10:12].copy_(w.view(-1)[10:12].flip(0)),
    "distant values swapped": lambda w: w.view(-1)[8:73:64].copy_(w.view(-1)[8:73:64].flip(0)),
    "rounded": lambda w: w.copy_(w.to(torch.float8_e5m2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (48, 1024), (7, 33)], ids=str)
def test_whole_changes(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = {"nothing": checksum((weight,))}
    for name, change in CHANGES.items():
        changed = weight.clone()
        change(changed)
        if not torch.equal(changed.view(torch.uint8), weight.view(torch.uint8)):
            seen[name] = checksum((changed,))
    assert len(set(seen.values())) == len(seen) > 10


def test_changes_of_two_words_in_one_hash():
    """Sign bits and their effects on the next step of the same hash, which cancel in simpler hashes."""
    data = torch.zeros(4 * BLOCK // 4, dtype=torch.int32)
    for filled in (data, data + 0x3F800000, random_bytes(4 * BLOCK).view(torch.int32)):
        seen = set()
        deltas = [-(2**31), 2**16, 2**15, 2**30, 1, 2**17, -(2**31) + 2**16, -(2**31) + 2**15, -(2**31) + 2**14]
        for first, second in itertools.product(deltas, deltas):
            changed = filled.clone()
            changed[5] ^= first
            changed[5 + 64] ^= second
            seen.add(checksum((changed,)))
        assert len(seen) == len(deltas) ** 2
        assert checksum((filled,)) not in seen


def test_many_random_changes_give_as_many_checksums():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    seen = set()
    for _ in range(3000):
        row, column = torch.randint(64, (2,), generator=generator).tolist()
        weight[row, column] += 1
        seen.add(checksum((weight,)))
    assert len(seen) == 3000


def test_pieces_are_told_apart():
    a, b = random_bytes(300), random_bytes(200, seed=1)
    joined = torch.cat([a, b])
    sums = [checksum(each) for each in ((a, b), (b, a), (joined,), (a,), (b,), (a, b, b[:0]), (a, a), ())]
    assert len(set(sums)) == len(sums)


def test_what_can_be_read():
    weight = nn.Parameter(torch.randn(6, 8))
    freed = torch.randn(4, 4)
    freed.untyped_storage().resize_(0)
    readable = [weight, weight[2:4], weight.t(), weight.data.view(torch.int32), torch.randn(3, 2, 2), torch.empty(0, 3)]
    gaps = [weight[:, :4], weight[::2], weight.expand(2, 6, 8), weight[:1].expand(4, 8)]
    others = [freed, torch._neg_view(weight.data), weight.to("meta"), weight.data.to_sparse(), weight.data.to_mkldnn()]
    assert [is_readable(tensor) for tensor in readable] == [True] * len(readable)
    assert [is_readable(tensor) for tensor in (*gaps, *others)] == [False] * (len(gaps) + len(others))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
def test_what_stands_for_memory_is_not_read():
    seen = []

    def look(tensor):
        seen.append(is_readable(tensor))
        return tensor * 2

    torch.func.vmap(look)(torch.randn(3, 4))
    torch.jit.trace(look, torch.randn(3, 4), check_trace=False)
    with FlopCounterMode(display=False):
        look(torch.randn(3, 4))
    assert seen == [False] * 3
