import importlib

import pytest
import torch
from torch.nn import functional as F

from mplug2_fast import ops
from mplug2_fast.ops.local_temporal import MANY_ROWS, in_passes, temporal_conv
from tests.ops.suite import CUDA, TRITON_DEVICE, TRITON_DTYPES, DifferentiableOpSuite, device, label, with_sizes
from tests.tolerance import assert_close_enough

# Whose name is also that of the function in it.
MODULE = importlib.import_module("mplug2_fast.ops.local_temporal")
BACKENDS = ["cpu", "torch", "reference", *(["triton"] if TRITON_DEVICE else [])]


class TestSpecification(DifferentiableOpSuite):
    operator = ops.local_temporal


@pytest.fixture(params=BACKENDS)
def run(request):
    """The operator on one backend, with some arguments replaced."""
    if request.param == "cpu":
        request.getfixturevalue("native_module")
    sizes = {"batch": 2, "frames": 4, "patches": 9, "channels": 16, "inner": 8}
    given = ops.local_temporal.op.spec.inputs(sizes, device=device(request.param))

    def call(**changes):
        with ops.use_backend(request.param):
            return ops.local_temporal(**{**given, **changes})

    call.given = given
    return call


def test_class_token_passes_by_and_input_stays(run):
    before = run.given["x"].clone()
    out = run()
    assert torch.equal(out[:, :, 0], before[:, :, 0])
    assert torch.equal(run.given["x"], before)


def test_frames_are_seen_in_order(run):
    backwards = run(x=run.given["x"].flip(1)).flip(1)
    assert (backwards - run())[:, :, 1:].abs().max() > 0.1


def test_what_the_class_token_holds_does_not_matter(run):
    x = run.given["x"].clone()
    x[:, :, 0] = torch.nan
    assert torch.equal(run(x=x)[:, :, 1:], run()[:, :, 1:])


@pytest.mark.parametrize("kernel", [1, 3, 5, 9])
@pytest.mark.parametrize("frames", [1, 2, 3, 8])
def test_temporal_conv(frames, kernel):
    x, weight, bias = torch.randn(2, frames, 3, 4), torch.randn(4, kernel), torch.randn(4)
    flat = x.permute(0, 2, 3, 1).reshape(6, 4, frames)
    expected = F.conv1d(flat, weight[:, None], bias, padding=kernel // 2, groups=4)
    expected = expected.view(2, 3, 4, frames).permute(0, 3, 1, 2)
    torch.testing.assert_close(temporal_conv(x, weight, bias), expected)
    torch.testing.assert_close(temporal_conv(x, weight, None), expected - bias)


def test_bad_arguments(run):
    with pytest.raises(ValueError, match="odd number of frames, got 2"):
        run(conv_weight=torch.randn(8, 2))
    with pytest.raises(ValueError, match=r"down_weight must have shape \(8, 16\)"):
        run(down_weight=torch.randn(8, 15))
    with pytest.raises(ValueError, match="x must be"):
        run(x=torch.randn(4, 10, 16))
    with pytest.raises(ValueError, match="activation is 'relu': it must be one of none, gelu, quick_gelu"):
        run(activation="relu")
    with pytest.raises(ValueError, match="norm_bias is given without norm_weight"):
        run(norm_weight=None)


def test_without_class_token_every_token_is_a_patch(run):
    patches = run.given["x"][:, :, 1:]
    torch.testing.assert_close(run(x=patches, class_token=False), run()[:, :, 1:])


def test_without_residual_the_class_token_still_passes_by(run):
    x, update = run.given["x"], run(residual=False)
    assert torch.equal(update[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(update[:, :, 1:], (run() - x)[:, :, 1:])


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
def test_no_patches_at_all(backend, serving):
    sizes = {"batch": 2, "frames": 4, "patches": 0, "channels": 16, "inner": 8}
    given = ops.local_temporal.op.spec.inputs(sizes, device=device(backend))
    with ops.use_backend(backend):
        assert torch.equal(ops.local_temporal(**given), given["x"])
        assert ops.local_temporal(**{**given, "x": given["x"][:, :, 1:], "class_token": False}).shape == (2, 4, 0, 16)


def test_which_rows_go_in_passes():
    few, many = (torch.empty(1, rows, 1, 8, dtype=torch.bfloat16, device="meta") for rows in (MANY_ROWS - 1, MANY_ROWS))
    assert not in_passes(few)
    assert in_passes(many)
    assert not in_passes(many.float())


@pytest.mark.skipif(TRITON_DEVICE is None, reason="no GPU, and Triton does not interpret")
@pytest.mark.parametrize(
    ("sizes", "dtype", "backend"),
    with_sizes(ops.local_temporal.op, [(dtype, "triton") for dtype in TRITON_DTYPES]),
    ids=label,
)
def test_triton_in_passes(sizes, dtype, backend, request, monkeypatch):
    """The kernels for many rows, with few rows."""
    monkeypatch.setattr(MODULE, "in_passes", lambda x: x.numel() > 0)
    TestSpecification().test_forward(sizes, dtype, backend, request, monkeypatch)
    TestSpecification().test_gradients(sizes, dtype, backend, request)


@pytest.mark.skipif(TRITON_DEVICE is None, reason="no GPU, and Triton does not interpret")
@pytest.mark.parametrize("dtype", TRITON_DTYPES[1:], ids=label)
@pytest.mark.parametrize("switches", [{}, {"class_token": False, "residual": False}], ids=label)
def test_triton_with_many_rows(dtype, switches, monkeypatch):
    """So many rows that they take separate passes. Class tokens do not affect patches."""
    monkeypatch.setattr(MODULE, "MANY_ROWS", MANY_ROWS if CUDA else 500)  # which takes the interpreter long enough
    sizes = {"batch": 3, "frames": 7, "patches": 400 if CUDA else 30, "channels": 16, "inner": 8, **switches}
    given = ops.local_temporal.op.spec.inputs(sizes, dtype, TRITON_DEVICE)
    assert in_passes(given["x"])
    eager, exact = (ops.local_temporal.op.spec.reference(**given, upcast=upcast) for upcast in (False, True))
    with ops.use_backend("triton"):
        ours = ops.local_temporal(**given)
        if given["class_token"]:
            given["x"][:, :, 0] = torch.nan
            assert torch.equal(ops.local_temporal(**given)[:, :, 1:], ours[:, :, 1:])
    assert_close_enough(ours, eager, exact, ops.local_temporal.op.spec.noise_floor[dtype], "forward")


@pytest.mark.skipif(TRITON_DEVICE is None, reason="no GPU, and Triton does not interpret")
class TestTriton:
    @pytest.fixture(params=[False, True], ids=["few rows", "in passes"], autouse=True)
    def way(self, request, monkeypatch):
        monkeypatch.setattr(MODULE, "in_passes", lambda x: request.param)

    @pytest.mark.parametrize(("frames", "kernel"), [(16, 3), (31, 5), (100, 3), (128, 9)])
    def test_many_frames(self, frames, kernel):
        sizes = {"batch": 2, "frames": frames, "patches": 2, "channels": 20, "inner": 8, "kernel": kernel}
        given = ops.local_temporal.op.spec.inputs(sizes, device=TRITON_DEVICE)
        leaves = {n: v.requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        results, gradients = [], []
        for backend in ("triton", "torch"):
            with ops.use_backend(backend):
                results.append(ops.local_temporal.op(*leaves.values()))
            tensors = [v for v in leaves.values() if isinstance(v, torch.Tensor)]
            gradients.append(torch.autograd.grad(results[-1].square().sum(), tensors))
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)

    def test_more_frames_than_a_tile_has_are_torchs(self):
        given = ops.local_temporal.op.spec.inputs(
            {"batch": 1, "frames": 129, "patches": 1, "channels": 8, "inner": 4}, device=TRITON_DEVICE
        )
        explanation = ops.explain(ops.local_temporal, **given)
        assert "up to 128 frames, got 129" in str(explanation)

    def test_statistics_of_rows_far_from_zero(self):
        """A norm that subtracts squares would lose all digits."""
        sizes = {"batch": 1, "frames": 2, "patches": 5, "channels": 200, "inner": 8}
        given = ops.local_temporal.op.spec.inputs(sizes, device=TRITON_DEVICE)
        given["x"] = given["x"] + 1000
        with ops.use_backend("triton"):
            ours = ops.local_temporal(
                **given,
            )
        exact = ops.local_temporal.op.spec.reference(**given, upcast=True)
        assert (ours - given["x"] - (exact - given["x"])).abs().max() < 2e-3
