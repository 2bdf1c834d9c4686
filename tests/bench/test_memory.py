import mmap

from bench import memory


def test_peak_memory_is_of_the_run():
    assert memory.reset_peak("cpu")
    before = memory.peak("cpu")
    with mmap.mmap(-1, 200 << 20) as block:  # which no allocator keeps
        for _ in range(200):
            block.write(b"x" * (1 << 20))
        assert memory.peak("cpu") > before + (150 << 20)
    assert memory.reset_peak("cpu")
    assert memory.peak("cpu") < before + (150 << 20)
