import pytest
import torch

from mplug2_fast import ops
from mplug2_fast.ops.attention import attention_with_dropout
from tests.ops.suite import DifferentiableOpSuite


class TestSpecification(DifferentiableOpSuite):
    operator = ops.attention


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_a_query_that_sees_no_key_gets_zeros(backend, native_module):
    query, key, value = (torch.randn(2, 3, 2, 16) for _ in range(3))
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]])
    with ops.use_backend(backend):
        assert not ops.attention(query, key, value, key_padding_mask=mask)[0].any()
        causal = ops.attention(query, key, value, key_padding_mask=mask, causal=True)
    assert not causal[0].any()
    assert not causal[1, 0].any()
    assert causal[1, 1:].abs().min() > 0


def test_threads_do_not_change_the_result(native_module):
    query, key, value = (torch.randn(1, 130, 3, 32) for _ in range(3))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.attention(query, key, value))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_keys(native_module):
    query, nothing = torch.randn(2, 3, 2, 16), torch.randn(2, 0, 2, 16)
    with ops.use_backend("cpu"):
        assert not ops.attention(query, nothing, nothing).any()


def test_dropout():
    query, key, value = (torch.randn(2, 9, 2, 16) for _ in range(3))
    assert torch.equal(attention_with_dropout(query, key, value, 0.0), ops.attention(query, key, value))
    torch.manual_seed(0)
    dropped = attention_with_dropout(query, key, value, 0.5)
    assert not torch.equal(dropped, attention_with_dropout(query, key, value, 0.5))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3, 4), (2, 3, 4), (2, 3, 4)), {}, "query must be"),
        (((2, 3, 4, 8), (2, 5, 4, 8), (2, 6, 4, 8)), {}, "key and value"),
        (((2, 3, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)), {}, "must agree in batch, heads and head_dim"),
        (((2, 3, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8)), {"causal": True}, "as many queries as keys"),
        (((2, 3, 4, 8),) * 3, {"key_padding_mask": torch.ones(2, 4)}, r"key_padding_mask must be \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_go_together(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        ops.attention(*(torch.randn(shape) for shape in shapes), **options)
