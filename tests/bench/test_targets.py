from dataclasses import replace

import pytest

from bench import targets
from bench.row import Baseline, Key, Results, Row
from bench.targets import MET, MISSED, NOT_MEASURED, STATED

CEILINGS = {
    "gemm": {
        dtype: {"gflops": rate, "operator": "a product"} for dtype, rate in (("bfloat16", 450.0), ("float32", 220.0))
    },
    "copy_gb_per_second": 40.0,
}
CAPTIONING = Row(
    key=Key("model", "captioning", "large, 16 frames, 5 beams, 15 steps", "forward", "bfloat16", "cpu"),
    seconds=10.0,
    spread=0.01,
    runs=5,
    flop=3_460_000_000_000,
    bytes=None,
    tflops=0.346,
    gb_per_second=None,
    percent_of_ceiling=76.9,
    bound="compute",
    baselines={"reference": Baseline(310.0, 31.0), "compiled": Baseline(12.0, 1.2)},
    peak_memory_bytes=2_990_000_000,
    added_memory_bytes=None,
    relative_error=0.01,
    allowed_error=0.02,
    correct=True,
    backend="native, oneDNN",
    command="python bench/run.py",
)


def op(name: str, dtype: str = "bfloat16", sizes: str = "large", device: str = "cpu", **values: object) -> Row:
    key = Key("ops", name, sizes, "forward", dtype, device)
    baselines = {name: Baseline(1.0, ratio) for name, ratio in values.pop("ratios", {}).items()}
    return replace(CAPTIONING, key=key, baselines=baselines, **values)


def verdicts(row: Row, ceilings: dict | None = None) -> dict[str, str]:
    return {judged.target.wanted: judged.verdict for judged in targets.of(row, ceilings)}


def test_captioning_has_targets_for_ratios_share_and_memory():
    assert verdicts(CAPTIONING) == {
        "≥ 30× reference": MET,
        "≥ 1.3× compiled": MISSED,
        "≥ 80% of the GEMM ceiling": MISSED,
        "≤ 3 GB peak memory": MET,
    }
    assert verdicts(replace(CAPTIONING, baselines={}))["≥ 30× reference"] == NOT_MEASURED


@pytest.mark.parametrize(
    "changed",
    [
        {"sizes": "base, 16 frames, 5 beams, 15 steps"},
        {"sizes": "large, 16 frames, 5 beams, 15 steps, batch 8"},
        {"name": "captioning, accelerated"},
        {"dtype": "float16"},
        {"name": "answering"},
        {"direction": "both"},
        {"device": "cuda", "dtype": "float32"},
    ],
)
def test_other_work_has_no_target(changed):
    assert targets.of(replace(CAPTIONING, key=replace(CAPTIONING.key, **changed))) == []


def test_a_gpu_has_other_bounds_and_another_batch():
    key = replace(CAPTIONING.key, device="cuda:0", sizes="large, 16 frames, 5 beams, 15 steps, batch 32")
    row = replace(CAPTIONING, key=key, seconds=0.2, tflops=550.0)
    assert verdicts(row) == {
        "≥ 474 TFLOP/s (790 is the H200's GEMM ceiling)": MET,
        "≥ 137 videos per second": MET,
        "≥ 1.3× compiled": MISSED,
    }
    assert verdicts(replace(row, key=replace(key, sizes="large, 16 frames"))) == {"≤ 4 GB peak memory": MET}


def test_operators_are_compared_with_their_bounds():
    assert verdicts(op("layer_norm", ratios={"copy": 0.81})) == {"≥ 80% of copy bandwidth": MET}
    assert verdicts(op("layer_norm", ratios={"copy": 0.81}, device="cuda")) == {"≥ 85% of copy bandwidth": MISSED}
    assert verdicts(op("mlp", ratios={"two GEMMs": 0.96})) == {"≥ 95% of the two GEMMs alone": MET}
    assert verdicts(op("attention", ratios={"torch": 2.0})) == {"≥ 2.5× SDPA": MISSED}
    assert verdicts(op("attention", "float32", "large, universal", ratios={"torch": 2.0})) == {"≥ 1.3× SDPA": MET}
    assert verdicts(op("attention", sizes="base", ratios={"torch": 2.0})) == {}
    kernels = {"torch": 1.2, "SDPA by cuDNN": 0.9, "SDPA by flash": 1.3}
    assert verdicts(op("attention", ratios=kernels, device="cuda")) == {"≥ 1× SDPA": MISSED}
    (stated,) = targets.of(op("beam_attention", gb_per_second=16.5))
    assert (stated.verdict, stated.figure) == (STATED, "16.5 GB/s")
    on_gpu = op("beam_attention", device="cuda", percent_of_ceiling=85.0, bound="memory")
    assert verdicts(on_gpu) == {"≥ 80% of copy bandwidth": MET}


def test_a_decoding_step_is_compared_with_its_traffic():
    key = Key("modules", "decoder step", "large", "forward", "bfloat16", "cpu")
    row = replace(CAPTIONING, key=key, gb_per_second=20.0, percent_of_ceiling=50.0, bound="memory")
    (judged,) = targets.of(row, CEILINGS)
    assert (judged.figure, judged.verdict) == ("2.00×", MISSED)
    assert [judged.figure for judged in targets.of(row)] == ["2.00×"]
    compute_bound = replace(row, percent_of_ceiling=90.0, bound="compute")
    assert [judged.figure for judged in targets.of(compute_bound, CEILINGS)] == ["2.00×"]
    assert [judged.verdict for judged in targets.of(compute_bound)] == [NOT_MEASURED]


def test_calls_are_compared_with_their_kernel():
    key = Key("modules", "operator call", "large", "forward", "float32", "cpu")
    calls = replace(CAPTIONING, key=key, seconds=0.016, baselines={"kernel": Baseline(0.0016, 0.1)})
    (judged,) = targets.of(calls)
    assert (judged.figure, str(judged)) == ("14.4 µs", "≤ 15 µs a call beyond its kernel: met")
    (judged,) = targets.of(replace(calls, baselines={}))
    assert judged.verdict == NOT_MEASURED


def test_rounding_never_makes_a_missed_target_look_met():
    (judged,) = targets.of(op("mlp", ratios={"two GEMMs": 0.9499}))
    assert (judged.figure, str(judged)) == ("94.99%", "≥ 95% of the two GEMMs alone: missed")
    (judged,) = targets.of(op("mlp", ratios={"two GEMMs": 0.95}))
    assert (judged.figure, judged.verdict) == ("95%", MET)


def test_all_targets_of_a_device_are_judged():
    run = Results({}, {}, CEILINGS, [CAPTIONING, op("mlp", ratios={"two GEMMs": 0.96})])
    judged = targets.judge([run], "cpu")
    assert [each.target for each in judged] == [target for target in targets.TARGETS if target.device == "cpu"]
    assert sum(each.verdict != NOT_MEASURED for each in judged) == 5
    assert {each.verdict for each in targets.judge([run], "cuda")} == {NOT_MEASURED}
    assert {each.target.wanted for each in targets.judge([], "cuda")} >= {"≥ 1 replay of a CUDA graph"}


def test_targets_name_existing_operators_and_sizes():
    from mplug2_fast.ops import OPERATORS

    for target in targets.TARGETS:
        if target.level == "ops":
            assert target.sizes in OPERATORS[target.name].op.spec.models
