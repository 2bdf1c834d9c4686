"""Each module in all its forms, at its smallest."""

import pytest
import torch

from bench.modules import cases, decoder_step, fusion_layer, operator_call, temporal_block, universal_layers
from bench.row import Selection
from mplug2_fast import MPlug2Config
from mplug2_fast.nn import text_decoder
from mplug2_fast.nn.attention import AttentionHeads
from mplug2_fast.nn.bert_layer import BertOutput
from mplug2_fast.ops import decoder_layer, layer_norm

TINY, LARGE = MPlug2Config.preset("tiny"), MPlug2Config.preset("large")
ALL = Selection("tiny", dtypes=("float32", "bfloat16"), directions=("forward", "backward", "both"))
KEYS = [key for key in cases.keys(ALL) if key.name in cases.MODULES]


def test_keys():
    assert [str(key) for key in cases.keys(Selection("large", ("float32",)))] == [
        "TemporalBlock · large · float32",
        "universal layers · large · float32",
        "fusion layer · large · float32",
        "decoder step · large · float32",
        "operator call · large · float32",
    ]
    assert {key.name for key in cases.keys(Selection("large", ("float32",), device="cuda"))} == set(cases.MODULES)
    only = Selection("base", ("float32",), only=("fusion layer", "attention"), directions=("forward", "both"))
    assert [(key.name, key.direction) for key in cases.keys(only)] == [
        ("fusion layer", "forward"),
        ("fusion layer", "both"),
    ]
    assert len(KEYS) == 2 * (3 * 3 + 1)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_all_ways_run_and_ours_agrees(key):
    case = cases.build(key, compile=False)
    assert list(case.ways) == ["ours", "reference", "eager"]
    for prepare in case.ways.values():
        (call,) = prepare()
        call()
        call()
    found = case.agreement()
    assert found.ours <= found.allowed
    assert found.allowed < {"float32": 2e-5, "bfloat16": 0.1}[key.dtype]
    assert case.flop > 0
    assert case.bytes > 0
    assert case.backend


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("name", list(cases.MODULES))
def test_a_wrong_result_is_noticed(name, direction, monkeypatch):
    context = AttentionHeads.context

    def wrong(*args, **options):
        return 1.1 * context(*args, **options)

    def wrong_layer(x, norm, qkv, self_out, *others, **options):
        return decoder_layer(x, norm, qkv, (1.1 * self_out[0], self_out[1]), *others, **options)

    output = BertOutput.forward
    monkeypatch.setattr(BertOutput, "forward", lambda self, hidden, x: output(self, 1.1 * hidden, x))
    monkeypatch.setattr(AttentionHeads, "context", wrong)
    monkeypatch.setattr(text_decoder, "decoder_layer", wrong_layer)
    for key in cases.keys(Selection("tiny", dtypes=("bfloat16",), only=(name,), directions=(direction,))):
        found = cases.build(key, compile=False).agreement()
        assert found.ours > found.allowed


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("name", list(cases.MODULES))
def test_compiled(name, direction, monkeypatch):
    compiled = []

    def record(function, **_):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", record)
    for key in cases.keys(Selection("tiny", ("float32",), only=(name,), directions=(direction,))):
        case = cases.build(key, compile=True)
        assert list(case.ways) == ["ours", "reference", "eager", "compiled"]
        assert not compiled
        case.ways["compiled"]()[0]()
        assert compiled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_calls_of_an_operator(dtype, native_module, monkeypatch):
    monkeypatch.setattr(operator_call, "CALLS", 3)
    (key,) = cases.keys(Selection("tiny", (dtype,), only=("operator call",)))
    case = cases.build(key, compile=True)
    assert list(case.ways) == ["ours", "torch", "kernel"]
    for prepare in case.ways.values():
        (call,) = prepare()
        call()
    found = case.agreement()
    assert found.ours <= found.allowed
    assert case.backend == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_that_is_called_directly_computes_the_same(dtype, native_module):
    x, weight, bias, eps = layer_norm.op.spec.inputs(operator_call.SIZES, dtype).values()
    call, out = operator_call.kernel(x, weight, bias, eps)
    call()
    assert torch.equal(out, layer_norm(x, weight, bias, eps=eps))


def test_needed_work_of_large():
    assert temporal_block.flop(LARGE, False) == pytest.approx((828 + 104 + 1656 + 413) / 24 * 1e9, rel=1e-3)
    assert universal_layers.flop(LARGE, False) == pytest.approx(209.5e9, rel=5e-3)
    assert (
        universal_layers.flop(LARGE, True) - universal_layers.flop(LARGE, False) == 2 * 50 * 5 * 2**20 + 4 * 2500 * 1024
    )
    # Keys and values of 4097 tokens are most of it.
    assert fusion_layer.flop(LARGE, False) == pytest.approx(2 * 4097 * 2 * 2**20, rel=0.05)
    # Of 71 tokens that go through the decoder in 15 steps, 5.
    assert decoder_step.flop(LARGE) == pytest.approx((25 + 14 + 4.6) * 1e9 * 5 / 71, rel=0.02)
