"""LocalTemporal compared with the modules that it replaces, in plain PyTorch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mplug2_fast.nn import LocalTemporal
from mplug2_fast.ops.runtime import onednn

DIM, INNER = 24, 16
NORMS = {"layer": lambda: nn.LayerNorm(DIM), "batch": lambda: nn.BatchNorm3d(DIM), None: lambda: None}
ACTIVATIONS = {"none": lambda x: x, "gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}
CASES = {
    "mplug2": {},
    "mplug_owl": {"residual": False},
    "st_adapter": {"norm": None, "activation": "none"},
    "uniformerv2": {"norm": "batch", "activation": "none", "class_token": False},
    "batch_norm_and_class_token": {"norm": "batch", "activation": "gelu"},
    "batch_norm_alone": {"norm": "batch", "residual": False, "bias": False},
    "nothing": {"norm": None, "activation": "none", "class_token": False, "residual": False, "bias": False},
}


class Plain(nn.Module):
    """Conv3d on (batch, channels, frames, tokens, 1)."""

    def __init__(self, norm="layer", activation="quick_gelu", class_token=True, residual=True, bias=True, kernel=3):
        super().__init__()
        self.norm, self.activation, self.class_token, self.residual = NORMS[norm](), activation, class_token, residual
        self.down_proj = nn.Conv3d(DIM, INNER, 1, bias=bias)
        self.conv = nn.Conv3d(INNER, INNER, (kernel, 1, 1), padding=(kernel // 2, 0, 0), groups=INNER, bias=bias)
        self.up_proj = nn.Conv3d(INNER, DIM, 1, bias=bias)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            if norm == "batch":
                self.norm.running_mean.normal_()
                self.norm.running_var.uniform_(0.5, 2)

    def layers(self):
        return {"norm": self.norm, "down_proj": self.down_proj, "conv": self.conv, "up_proj": self.up_proj}

    def forward(self, x):
        patches = x[:, :, 1:] if self.class_token else x
        h = self.norm(patches) if isinstance(self.norm, nn.LayerNorm) else patches
        # PyTorch's batch norm backward mistakes the strides of a last axis of 1 on a view, so here is a copy.
        h = h.permute(0, 3, 1, 2)[..., None].contiguous()
        h = self.norm(h) if isinstance(self.norm, nn.BatchNorm3d) else h
        h = self.up_proj(ACTIVATIONS[self.activation](self.conv(self.down_proj(h))))[..., 0].permute(0, 2, 3, 1)
        h = patches + h if self.residual else h
        return torch.cat([x[:, :, :1], h], dim=2) if self.class_token else h


def pair(training=True, **options):
    """The plain module, and ours with its parameters and running statistics."""
    plain, ours = Plain(**options), LocalTemporal(DIM, reduction=1.5, **options)
    ours.load_renamed(plain.state_dict(), ln="norm", bn="norm")
    return plain.train(training), ours.train(training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_outputs_gradients_and_running_statistics(options, training):
    plain, ours = pair(training, **options)
    x = torch.randn(2, 5, 7, DIM)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    direction = torch.randn(2, 5, 7, DIM)
    for module, leaf in zip((plain, ours), leaves, strict=True):
        (module(leaf) * direction).sum().backward()
    torch.testing.assert_close(ours(x), plain(x), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, atol=1e-5, rtol=1e-5)
    theirs = {name.replace("norm.", "bn." if ours.bn else "ln."): p for name, p in plain.named_parameters()}
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-4)
    for mine, other in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_layers_of_another_module_are_shared(options):
    plain = Plain(**options).eval()
    settings = {name: value for name, value in options.items() if name not in ("norm", "bias")}
    ours = LocalTemporal.around(**plain.layers(), **settings)
    assert not ours.training
    x = torch.randn(2, 5, 7, DIM)
    torch.testing.assert_close(ours(x), plain(x), atol=2e-6, rtol=1e-5)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in plain.parameters()}
    with torch.no_grad():
        plain.up_proj.weight.mul_(2)
    torch.testing.assert_close(ours(x), plain(x), atol=4e-6, rtol=1e-5)


def test_shared_layers_keep_their_modes():
    plain = Plain(norm="batch").train()
    plain.norm.eval()  # frozen
    ours = LocalTemporal.around(**plain.layers())
    assert ours.training
    assert not plain.norm.training
    before = plain.norm.running_mean.clone()
    x = torch.randn(2, 5, 7, DIM)
    torch.testing.assert_close(ours(x), plain(x), atol=2e-6, rtol=1e-5)
    assert torch.equal(plain.norm.running_mean, before)


def test_linear_layers_work_too():
    plain = Plain()
    down, up = nn.Linear(DIM, INNER), nn.Linear(INNER, DIM)
    for linear, conv in ((down, plain.down_proj), (up, plain.up_proj)):
        linear.weight.data, linear.bias.data = conv.weight.detach().flatten(1), conv.bias.detach()
    x = torch.randn(2, 5, 7, DIM)
    ours = LocalTemporal.around(norm=plain.norm, down_proj=down, conv=plain.conv, up_proj=up)
    torch.testing.assert_close(ours(x), plain(x), atol=2e-6, rtol=1e-5)
    loaded = LocalTemporal(DIM, inner=INNER)
    loaded.load_renamed({"a.weight": down.weight, "a.bias": down.bias, **ours.state_dict()}, down_proj="a")
    torch.testing.assert_close(loaded(x), plain(x), atol=2e-6, rtol=1e-5)


def test_official_names_and_shapes():
    shapes = {name: tuple(value.shape) for name, value in LocalTemporal(DIM, 1.5, 5).state_dict().items()}
    assert shapes == {
        "ln.weight": (DIM,),
        "ln.bias": (DIM,),
        "down_proj.weight": (INNER, DIM, 1, 1, 1),
        "down_proj.bias": (INNER,),
        "conv.weight": (INNER, 1, 5, 1, 1),
        "conv.bias": (INNER,),
        "up_proj.weight": (DIM, INNER, 1, 1, 1),
        "up_proj.bias": (DIM,),
    }


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_any_leading_axes(leading):
    plain, ours = pair()
    x = torch.randn(*leading, 5, 7, DIM)
    torch.testing.assert_close(ours(x), plain(x.view(-1, 5, 7, DIM)).view(x.shape), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dense", ["channels", "width"])
def test_channels_first(norm, dense):
    options = {"norm": norm, "class_token": False}
    plain, ours = pair(**options)
    first = LocalTemporal(DIM, reduction=1.5, layout="channels_first", **options)
    first.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 6, DIM)
    expected = plain(x).view(2, 5, 2, 3, DIM).permute(0, 4, 1, 2, 3)
    x = x.view(2, 5, 2, 3, DIM).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(first(x if dense == "channels" else x.contiguous()), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"norm": "batch"}, {"residual": False}], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast_rounds_no_residual(options, training):
    plain, ours = pair(training, **options)
    x = torch.randn(2, 5, 7, DIM)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        narrow = ours(x)
    assert narrow.dtype == (torch.float32 if options.get("residual", True) else torch.bfloat16)
    torch.testing.assert_close(narrow.float(), plain(x), atol=0.1, rtol=0.05)
    assert torch.equal(narrow[:, :, 0], x[:, :, 0].to(narrow.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batch_norm_far_from_zero_in_half_precision(dtype):
    plain, ours = pair(False, norm="batch", residual=False)
    for module in (plain.norm, ours.bn):
        module.running_mean.fill_(50)
    x = (torch.randn(2, 5, 7, DIM) + 50).to(dtype)
    exact = plain(x.float())
    eager, actual = (module.to(dtype)(x).float() - exact for module in (plain, ours))
    assert actual.norm() < 1.5 * eager.norm()


def test_a_narrow_module_with_wide_running_statistics():
    plain, ours = pair(False, norm="batch")
    ours.bfloat16().bn.float()
    out = ours(torch.ones(1, 2, 3, DIM, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(torch.ones(1, 2, 3, DIM)), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_compiles_whole(options, training):
    torch._dynamo.reset()
    _, ours = pair(training, **options)
    x = torch.randn(2, 3, 5, DIM)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x))


def test_views_of_packed_weights_use_the_packed_copy(monkeypatch, native_module):
    monkeypatch.setattr(onednn, "pays", lambda weight, rows: True)
    _, ours = pair(False)
    x, seen = torch.randn(2, 5, 7, DIM), []
    with torch.no_grad():
        plain = ours(x)
        for layer in (ours.down_proj, ours.up_proj):
            onednn.pack(layer.weight, 70)
            assert onednn.packed(layer.weight) is onednn.packed(layer.weight.flatten(1)) is not None
            assert onednn.packed(layer.weight[:4].flatten(1)) is None
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Seen(torch.ops.mkldnn._linear_pointwise, seen))
        torch.testing.assert_close(ours(x), plain)
        assert len(seen) == 2
        assert all(weight.is_mkldnn for weight in seen)
        ours.up_proj.weight.data.mul_(2)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x)[:, :, 1:], (2 * plain - x - ours.up_proj.bias)[:, :, 1:], atol=1e-5, rtol=0)


class Seen:
    """Wraps oneDNN's linear and its binary form, and records their weights."""

    def __init__(self, linear, seen):
        self.linear, self.seen = linear, seen

    def __call__(self, x, weight, *others):
        self.seen.append(weight)
        return self.linear(x, weight, *others)

    def binary(self, x, residual, weight, *others):
        self.seen.append(weight)
        return self.linear.binary(x, residual, weight, *others)


def test_a_packed_square_weight_does_not_serve_its_transpose(native_module):
    weight = torch.randn(16, 16)
    onednn.pack(weight, 70)
    assert onednn.packed(weight) is not None
    assert onednn.packed(weight.t()) is None
    assert onednn.packed(weight) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"norm": "group"}, "norm is 'group'"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"layout": "NCTHW"}, "layout is 'NCTHW'"),
        ({"layout": "channels_first"}, "pass class_token=False"),
    ],
    ids=str,
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        LocalTemporal(DIM, **options)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"norm": nn.BatchNorm1d(DIM)}, "norm must be"),
        ({"norm": nn.LayerNorm(DIM, elementwise_affine=False)}, "have a weight"),
        ({"down_proj": nn.Conv3d(DIM, INNER, 3)}, "down_proj must be"),
        ({"up_proj": nn.ReLU()}, "up_proj must be"),
        ({"conv": nn.Conv3d(INNER, INNER, (3, 1, 1), padding=(1, 0, 0))}, "conv must be"),
        ({"conv": nn.Conv3d(INNER, INNER, (3, 3, 3), padding=1, groups=INNER)}, "conv must be"),
        ({"conv": nn.Conv3d(INNER, INNER, (3, 1, 1), groups=INNER)}, "conv must be"),
        ({"conv": nn.Linear(INNER, INNER)}, "conv must be"),
    ],
    ids=str,
)
def test_unsupported_layers(layers, message):
    with pytest.raises(ValueError, match=message):
        LocalTemporal.around(**{**Plain().layers(), **layers})


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown layer norm: use ln, bn, down_proj, conv, up_proj"):
        LocalTemporal(DIM).load_renamed({}, norm="pos_embed.0")
    with pytest.raises(RuntimeError, match="Missing key"):
        LocalTemporal(DIM).load_renamed({})
    with pytest.raises(RuntimeError, match="size mismatch"):
        LocalTemporal(DIM).load_renamed(Plain(kernel=5).state_dict(), ln="norm")


@pytest.mark.parametrize("shape", [(7, DIM), (2, DIM, 5, 7)])
def test_bad_shapes(shape):
    module = LocalTemporal(DIM, class_token=False, layout="channels_first" if len(shape) == 4 else "channels_last")
    with pytest.raises(ValueError, match="x must be"):
        module(torch.randn(shape))
