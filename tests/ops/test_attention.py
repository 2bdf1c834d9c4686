import pytest
import torch
from torch.testing import assert_close

from mplug2_fast import ops
from mplug2_fast.ops import blockwise_dropout
from mplug2_fast.ops.attention import attention_with_dropout
from tests.ops.suite import TRITON_DEVICE, DifferentiableOpSuite, device

TRITON = ["triton"] if TRITON_DEVICE else []


class TestSpecification(DifferentiableOpSuite):
    operator = ops.attention


def random(backend, *shape):
    return torch.randn(shape, device=device(backend))


@pytest.mark.parametrize("backend", ["cpu", *TRITON, "torch", "reference"])
def test_a_query_that_sees_no_key_gets_zeros(backend, serving):
    query, key, value = (random(backend, 2, 3, 2, 16) for _ in range(3))
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]], device=query.device)
    with ops.use_backend(backend):
        assert not ops.attention(query, key, value, key_padding_mask=mask)[0].any()
        causal = ops.attention(query, key, value, key_padding_mask=mask, causal=True)
    assert not causal[0].any()
    assert not causal[1, 0].any()
    assert causal[1, 1:].abs().min() > 0


@pytest.mark.parametrize("backend", [*TRITON, "torch"])
@pytest.mark.parametrize("length", [5, 70])
def test_gradients_of_padding_and_of_a_query_that_sees_no_key_are_zeros(backend, length):
    leaves = [random(backend, 2, length, 2, 16).requires_grad_() for _ in range(3)]
    mask = torch.ones(2, length, dtype=torch.bool, device=leaves[0].device)
    mask[0], mask[1, 0] = False, False
    query, *memory = leaves
    key, value = (tensor.masked_fill(~mask[:, :, None, None], torch.nan) for tensor in memory)
    with ops.use_backend(backend):
        out = ops.attention(query, key, value, key_padding_mask=mask, causal=True)
    padded = torch.autograd.grad(out.square().sum(), [query, key, value])
    for gradient in padded:
        assert not gradient[0].any()
        assert not gradient[1, 0].any()
        assert gradient[1, 2:-1].abs().min() > 0
    with ops.use_backend("reference"):
        other = ops.attention(*leaves, key_padding_mask=mask, causal=True)
    for gradient, expected in zip(padded, torch.autograd.grad(other.square().sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", [*TRITON, "torch"])
def test_gradients_that_are_asked_for(backend):
    tensors = [random(backend, 1, 9, 2, 16) for _ in range(3)]
    with ops.use_backend(backend):
        every = torch.autograd.grad(
            ops.attention(*(leaves := [t.clone().requires_grad_() for t in tensors])).square().sum(), leaves
        )
        for index, expected in enumerate(every):
            leaf = tensors[index].clone().requires_grad_()
            out = ops.attention(*tensors[:index], leaf, *tensors[index + 1 :])
            (found,) = torch.autograd.grad(out.square().sum(), [leaf])
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("backend", "name"), [*((b, "attention_train") for b in TRITON), ("torch", "attention")])
def test_training_under_compile(backend, name):
    """The graph's only operator returns what the backward reads, so the forward is not computed twice."""
    query, key, value = (random(backend, 2, 17, 2, 16).requires_grad_() for _ in range(3))
    mask = torch.ones(2, 17, dtype=torch.bool, device=query.device)
    mask[1, 9:] = False
    called = []

    def compiler(graph, inputs):
        called.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def loss(query, key, value):
        return ops.attention(query * 2, key, value, key_padding_mask=mask, causal=True).square().mean()

    torch._dynamo.reset()
    with ops.use_backend(backend):
        compiled = torch.compile(loss, fullgraph=True, backend=compiler)(query, key, value)
        found = torch.autograd.grad(compiled, [query, key, value])
        eager = loss(query, key, value)
        expected = torch.autograd.grad(eager, [query, key, value])
    assert getattr(torch.ops.mplug2_fast, name).default in called
    torch.testing.assert_close((compiled, found), (eager, expected))


def test_what_the_triton_kernels_do_not_serve():
    pytest.importorskip("triton")
    op = ops.attention.op

    def reasons(*values):
        return op.backends["triton"].not_supported_reasons(op.arguments(*values))

    query, wide = torch.randn(1, 3, 2, 16), torch.randn(1, 3, 2, 136)
    assert reasons(wide, wide, wide, None, False) == ["the Triton kernels support heads of up to 128 channels, got 136"]
    assert reasons(query, query.half(), query, None, False) == [
        "key is torch.float16, the first argument torch.float32"
    ]
    assert not reasons(query, query, query, None, False)


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


@pytest.mark.parametrize("backend", ["cpu", *TRITON])
def test_no_keys(backend, serving):
    query, nothing = random(backend, 2, 3, 2, 16).requires_grad_(), random(backend, 2, 0, 2, 16).requires_grad_()
    with ops.use_backend(backend):
        out = ops.attention(query, nothing, nothing)
        assert not out.any()
        out.sum().backward()
    assert not query.grad.any()
    assert nothing.grad.shape == nothing.shape


def test_dropout():
    query, key, value = (torch.randn(2, 9, 2, 16) for _ in range(3))
    assert torch.equal(attention_with_dropout(query, key, value, 0.0), ops.attention(query, key, value))
    torch.manual_seed(0)
    dropped = attention_with_dropout(query, key, value, 0.5)
    assert not torch.equal(dropped, attention_with_dropout(query, key, value, 0.5))


@pytest.mark.parametrize("block", [4, 60, 150])
@pytest.mark.parametrize("case", ["plain", "causal", "padding"])
def test_dropout_in_blocks(block, case, monkeypatch):
    monkeypatch.setattr(blockwise_dropout, "BLOCK", block)
    causal, mask = case == "causal", None
    inputs = [torch.randn(2, 7, 3, 4, requires_grad=True) for _ in range(3)]
    if case == "padding":
        mask = torch.tensor([[1, 1, 0, 1, 0, 0, 0], [0] * 7])
        inputs[1:] = [torch.randn(2, 7, 3, 4, requires_grad=True) for _ in range(2)]

    def attend(query, key, value, p=0.3):
        torch.manual_seed(0)
        return attention_with_dropout(query, key, value, p, key_padding_mask=mask, causal=causal)

    plain = ops.attention(*inputs, key_padding_mask=mask, causal=causal)
    assert not attend(*inputs, p=1.0).any()
    assert_close(attend(*inputs, p=1e-9), plain)
    assert_close(
        torch.autograd.grad(attend(*inputs, p=1e-9).sin().sum(), inputs), torch.autograd.grad(plain.sin().sum(), inputs)
    )
    with torch.no_grad():
        kept = attend(*inputs)
    assert torch.equal(kept, attend(*inputs))
    change = torch.randn_like(kept)
    found = torch.autograd.grad(attend(*inputs), inputs, change, create_graph=True)
    assert_close(torch.autograd.grad(attend(*inputs), inputs, change), found)
    second = torch.autograd.grad(sum(x.sin().sum() for x in found), inputs)
    assert all(x.isfinite().all() and x.any() for x in second)
    step = [torch.randn_like(x) for x in inputs]
    ends = [attend(*(x.detach() + sign * 1e-2 * y for x, y in zip(inputs, step, strict=True))) for sign in (1, -1)]
    slope = (ends[0] - ends[1]).mul(change).sum() / 2e-2
    assert_close(slope, sum((x * y).sum() for x, y in zip(found, step, strict=True)), rtol=1e-2, atol=1e-2)


def test_dropout_in_blocks_drops_the_stated_share(monkeypatch):
    monkeypatch.setattr(blockwise_dropout, "BLOCK", 1000)
    query, value = torch.zeros(1, 50, 2, 64), torch.eye(64)[None, :, None].expand(1, 64, 2, 64)
    weights = attention_with_dropout(query, torch.zeros_like(value), value, 0.25).unflatten(2, (2, 64))
    assert abs((weights == 0).float().mean() - 0.25) < 0.02
    assert_close(weights[weights > 0], torch.full_like(weights[weights > 0], 1 / 64 / 0.75))
    rows = weights[0].transpose(0, 1).flatten(0, 1) > 0
    assert len(rows.unique(dim=0)) == len(rows)  # no two queries drop the same


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
