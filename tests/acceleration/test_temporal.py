"""Local temporal modules of other models, as stand-ins, outside the official vision block."""

import copy

import pytest
import torch
from torch import nn

import mplug2_fast as mf
from mplug2_fast.acceleration.swap import STATE
from tests.acceleration.official_vision import LayerNorm, LocalTemporal, QuickGELU
from tests.golden.cases import relative_error


class LocalMHRA(nn.Module):
    """UniFormerV2's."""

    def __init__(self, width=24, inner=16, kernel=3):
        super().__init__()
        self.pos_embed = nn.Sequential(
            nn.BatchNorm3d(width),
            nn.Conv3d(width, inner, 1),
            nn.Conv3d(inner, inner, (kernel, 1, 1), padding=(kernel // 2, 0, 0), groups=inner),
            nn.Conv3d(inner, width, 1),
        )

    def forward(self, x):
        return self.pos_embed(x)


class NormedMHRA(nn.Module):
    """The same with a layer norm, as in a video retrieval model."""

    def __init__(self, width=24, inner=16):
        super().__init__()
        self.ln = LayerNorm(width)
        self.pos_embed = LocalMHRA(width, inner).pos_embed[1:]

    def forward(self, x):
        return self.pos_embed(self.ln(x.movedim(1, -1)).movedim(-1, 1))


class Adapter(nn.Module):
    """ST-Adapter's, which adds its result to its input in place."""

    def __init__(self, width=24, inner=12, kernel=(3, 1, 1)):
        super().__init__()
        padding = tuple(size // 2 for size in kernel)
        self.fc1 = nn.Linear(width, inner)
        self.conv = nn.Conv3d(inner, inner, kernel, padding=padding, groups=inner)
        self.fc2 = nn.Linear(inner, width)

    def update(self, patches, T):
        side = round(patches.shape[1] ** 0.5)
        volume = self.fc1(patches).unflatten(1, (side, side)).unflatten(0, (-1, T)).permute(0, 4, 1, 2, 3)
        return self.fc2(self.conv(volume).permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2))

    def forward(self, x, T):
        x[:, 1:] += self.update(x[:, 1:], T)
        return x


class NewAdapter(Adapter):
    def forward(self, x, T=2):
        return torch.cat([x[:, :1], x[:, 1:] + self.update(x[:, 1:], T)], dim=1)


class SequenceFirst(NewAdapter):
    def forward(self, x, T=2):
        return super().forward(x.transpose(0, 1), T).transpose(0, 1)


class OwlTemporal(nn.Module):
    """mPLUG-Owl-video's, for one image size. The caller adds the residual."""

    def __init__(self, width=24, side=4):
        super().__init__()
        inner, self.side = width // 2, side
        self.ln = LayerNorm(width)
        self.down_proj = nn.Conv3d(width, inner, 1)
        self.conv = nn.Conv3d(inner, inner, (3, 1, 1), padding=(1, 0, 0), groups=inner)
        self.up_proj = nn.Conv3d(inner, width, 1)
        self.activation_func = QuickGELU()

    def forward(self, x):
        h = self.ln(x[:, :, 1:]).unflatten(2, (self.side, self.side)).permute(0, 4, 1, 2, 3)
        h = self.up_proj(self.activation_func(self.conv(self.down_proj(h))))
        return torch.cat([x[:, :, :1], h.permute(0, 2, 3, 4, 1).flatten(2, 3)], dim=2)


def volume(width=24):
    return (torch.randn(2, width, 5, 3, 4),)


def frames(width=24):
    return torch.randn(2 * 5, 1 + 16, width), 5


MODULES = {
    "UniFormerV2": (LocalMHRA, volume),
    "five frames": (lambda: LocalMHRA(kernel=5), volume),
    "the layers alone": (lambda: LocalMHRA().pos_embed, volume),
    "layer norm": (NormedMHRA, volume),
    "mPLUG-2": (lambda: LocalTemporal(24), volume),
    "mPLUG-Owl-video": (OwlTemporal, lambda: (torch.randn(2, 5, 1 + 16, 24),)),
    "ST-Adapter": (Adapter, frames),
    "ST-Adapter, out of place": (NewAdapter, frames),
    "sequence first": (SequenceFirst, lambda: (torch.randn(1 + 16, 2 * 5, 24), 5)),
}
every = pytest.mark.parametrize("name", MODULES)


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1 - 0.6 * (tensor.dim() > 1))
    return module.eval()


def made(name):
    """A module, an accelerated copy, and arguments for a call."""
    torch.manual_seed(0)
    make, inputs = MODULES[name]
    plain = randomised(make())
    fast = copy.deepcopy(plain)
    report = mf.accelerate(fast)
    assert report.entries[0].replacement == "FastLocalTemporal", report.entries[0].reason
    return plain, fast, inputs()


def called(module, x, *others):
    """The result, whether it is the input, and the gradients."""
    leaf = x.clone().requires_grad_()
    given = leaf * 1
    out = module(given, *others)
    gradients = torch.autograd.grad((out * out.detach().cos()).sum(), [leaf, *module.parameters()])
    return out, out is given, gradients


@every
def test_result_and_gradients(name):
    plain, fast, (x, *others) = made(name)
    with torch.no_grad():
        expected, out = (module(x.clone(), *others) for module in (plain, fast))
    assert relative_error(out, expected) < 1e-5
    assert out.is_contiguous() is (name != "sequence first")  # whose stand-in returns a view
    (expected, is_input, gradients), (out, ours_is_input, ours) = (called(m, x, *others) for m in (plain, fast))
    assert relative_error(out, expected) < 1e-5
    assert ours_is_input is is_input
    for actual, gradient in zip(ours, gradients, strict=True):
        assert relative_error(actual, gradient) < 1e-4
    assert vars(fast)[STATE].calls.served == 2


def halved(module):
    """Converts all but layer norms to half precision, as CLIP does."""
    for part in module.modules():
        if not isinstance(part, nn.LayerNorm):
            part._apply(lambda tensor: tensor.bfloat16(), recurse=False)
    return module


@every
def test_half_precision_and_autocast(name):
    plain, fast, (x, *others) = made(name)
    exact = plain(x.clone(), *others)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, out = (module(x.clone(), *others) for module in (plain, fast))
        assert out.dtype is expected.dtype
        assert relative_error(out, exact) < 2 * relative_error(expected, exact) + 1e-3
    with torch.no_grad():
        expected, out = (halved(module)(x.bfloat16(), *others) for module in (plain, fast))
        assert out.dtype is expected.dtype
        assert relative_error(out, exact) < 2 * relative_error(expected, exact) + 1e-3
    assert vars(fast)[STATE].calls.served == 2


def test_batch_norm_far_from_zero_in_half_precision():
    plain, fast, (x,) = made("UniFormerV2")
    for module in (plain, fast):
        module.pos_embed[0].running_mean.fill_(50)
    x = (x + 50).bfloat16()
    exact = plain(x.float())
    with torch.no_grad():
        expected, out = (module.bfloat16()(x) for module in (plain, fast))
    assert relative_error(out, exact) < 2 * relative_error(expected, exact) + 1e-3


def test_channels_last_memory_format_is_kept():
    _, fast, (x,) = made("UniFormerV2")
    with torch.no_grad():
        out = fast(x.to(memory_format=torch.channels_last_3d))
    assert out.is_contiguous(memory_format=torch.channels_last_3d)


def test_batch_norm_in_training_runs_the_original_code():
    plain, fast, (x,) = made("UniFormerV2")
    for module in (plain.train(), fast.train()):
        module(x)
        module(x + 1)
    assert torch.equal(fast.pos_embed[0].running_var, plain.pos_embed[0].running_var)
    calls = vars(fast)[STATE].calls
    assert calls.served == 0
    fast.pos_embed[0].eval()  # frozen
    plain.pos_embed[0].eval()
    assert relative_error(fast(x), plain(x)) < 1e-5
    assert calls.served == 1


@pytest.mark.unserved_calls
@every
def test_hooks_on_parts_are_called(name):
    plain, fast, (x, *others) = made(name)
    expected = plain(x.clone(), *others)
    conv = next(part for part in fast.modules() if isinstance(part, nn.Conv3d) and part.groups > 1)
    seen = []
    handle = conv.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    with torch.no_grad():
        assert relative_error(fast(x.clone(), *others), expected) < 1e-5
        assert len(seen) == 1
        handle.remove()
        fast(x.clone(), *others)
    assert len(seen) == 1


@pytest.mark.unserved_calls
def test_replaced_parts_and_weights():
    plain, fast, (x, frame_count) = made("ST-Adapter, out of place")
    with torch.no_grad():
        for module in (plain, fast):
            module.fc2.weight.data *= 2
        assert relative_error(fast(x, frame_count), plain(x, frame_count)) < 1e-5
        for module in (plain, fast):
            module.fc1 = nn.Sequential(copy.deepcopy(plain.fc1), nn.ReLU())
        assert relative_error(fast(x, T=frame_count), plain(x, T=frame_count)) < 1e-5


def test_arguments():
    plain, fast, (x, _) = made("ST-Adapter, out of place")
    with torch.no_grad():
        for args, kwargs in (((x,), {}), ((x, 5), {}), ((x,), {"T": 10}), ((), {"x": x, "T": 1})):
            assert relative_error(fast(*args, **kwargs), plain(*args, **kwargs)) < 1e-5
    assert vars(fast)[STATE].calls.served == 4


@pytest.mark.unserved_calls
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("ST-Adapter, out of place", (torch.zeros(10, 17, 24), 3)),
        ("ST-Adapter, out of place", (torch.zeros(10, 1 + 15, 24), 5)),
        ("mPLUG-Owl-video", (torch.zeros(2, 5, 1 + 9, 24),)),
        ("UniFormerV2", (torch.zeros(2, 24, 5, 7),)),
    ],
    ids=["frames", "no square", "another image size", "axes"],
)
def test_calls_that_the_original_rejects(name, args):
    plain, fast, _ = made(name)
    messages = []
    for module in (plain, fast):
        with pytest.raises((RuntimeError, ValueError)) as error:
            module(*args)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


class Doubled(LocalMHRA):
    def forward(self, x):
        return 2 * super().forward(x)


def with_activation(activation):
    module = LocalTemporal(24)
    module.activation = activation
    return module


LEFT = {
    "other results": (Doubled, "it computes something other"),
    "other activation": (lambda: with_activation(nn.ReLU()), "it computes something other"),
    "no statistics": (
        lambda: nn.Sequential(nn.BatchNorm3d(24, track_running_stats=False), *LocalMHRA().pos_embed[1:]),
        "0 keeps no running statistics",
    ),
    "dilation": (
        lambda: nn.Sequential(
            nn.Conv3d(24, 8, 1), nn.Conv3d(8, 8, (3, 1, 1), dilation=2, groups=8), nn.Conv3d(8, 24, 1)
        ),
        "conv must be a depthwise convolution",
    ),
    "weights not made yet": (
        lambda: nn.Sequential(nn.LazyConv3d(8, 1), nn.Conv3d(8, 8, (3, 1, 1), groups=8), nn.Conv3d(8, 24, 1)),
        None,
    ),
    "space and time": (lambda: Adapter(kernel=(3, 3, 3)), None),
}


@pytest.mark.parametrize("name", LEFT)
def test_unsupported_modules(name):
    make, why = LEFT[name]
    module = make()
    report = mf.accelerate(module)
    assert STATE not in vars(module)
    if why is not None:
        assert why in report.entries[0].reason


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout(p):
    module = nn.Sequential(*LocalMHRA().pos_embed[1:], nn.Dropout(p)).train()
    mf.accelerate(module)
    x = volume()[0]
    with torch.no_grad():
        module(x)
        assert vars(module)[STATE].calls.served == (p == 0)
        assert torch.equal(module(x), module(x)) is (p == 0)
        module.eval()(x)
    assert vars(module)[STATE].calls.served == 1 + 3 * (p == 0)


def test_inside_an_unknown_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.lmhra1, self.lmhra2, self.other = LocalMHRA(), LocalMHRA(), nn.Linear(24, 24)

        def forward(self, x):
            return self.other((x + self.lmhra1(x) + self.lmhra2(x)).mean((2, 3, 4)))

    plain = randomised(Block())
    fast = copy.deepcopy(plain)
    report = mf.accelerate(fast)
    assert [e.replacement for e in report.entries if e.module == "LocalMHRA"] == 2 * ["FastLocalTemporal"]
    x = volume()[0]
    with torch.no_grad():
        assert relative_error(fast(x), plain(x)) < 1e-5
    mf.restore(fast)
    assert type(fast.lmhra1) is LocalMHRA


@pytest.mark.real_sizes
def test_small_calls_run_the_original_code():
    _, fast, (x,) = made("UniFormerV2")
    fast(x)
    assert vars(fast)[STATE].calls.no_gain == 1
