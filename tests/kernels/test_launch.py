"""Which launches call a compiled kernel directly, with a simulated GPU, Triton function and compiled kernel."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from mplug2_fast.kernels import _launch, _tuning
from mplug2_fast.kernels._launch import Kernel, Tiles
from mplug2_fast.kernels._tuning import Config

CONFIG = Config({"BLOCK": 32})


class OnGpu(torch.Tensor):
    """A tensor in the CPU's memory that claims to be on a GPU."""

    is_cuda = True
    number = 0

    def get_device(self) -> int:
        return self.number

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.number)


class OnAnother(OnGpu):
    number = 1


def on_gpu(dtype: torch.dtype = torch.float32, *, offset: int = 0, kind: type[OnGpu] = OnGpu) -> torch.Tensor:
    """`(4, 16)`, `offset` elements beyond an address of 16-byte alignment."""
    return torch.zeros(80, dtype=dtype)[offset : offset + 64].view(4, 16).as_subclass(kind)


class Launched:
    """Records launches with `[grid](...)` in order: grids, arguments and constants."""

    def __init__(self, result: object = None) -> None:
        self.result = result
        self.calls: list[tuple[object, list[object], dict[str, object]]] = []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.calls.append((grid, list(arguments), constants))
            return self.result

        return launch


class Function(Launched):
    """Has the names of a Triton function, constants last."""

    fn = SimpleNamespace(__name__="kernel")
    arg_names = ("x", "out", "rows", "scale", "FLAG", "BLOCK")


@pytest.fixture
def compiled():
    return Launched()


@pytest.fixture
def function(compiled):
    return Function(compiled)


@pytest.fixture
def capturing(monkeypatch):
    """`now` says whether a graph is being captured."""
    made = SimpleNamespace(now=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.now)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setenv(_tuning.VARIABLE, _tuning.OFF)
    return made


@pytest.fixture
def kernel(function, capturing):
    return Kernel(function, [CONFIG], CONFIG)


def launch(kernel, x=None, out=None, rows=4, scale=0.5, *, key=(), FLAG=True):
    """Returns the first two arguments."""
    x, out = (on_gpu() if tensor is None else tensor for tensor in (x, out))
    kernel(lambda meta: (rows, meta["BLOCK"]), x, out, rows, scale, key=key, FLAG=FLAG)
    return x, out


def test_a_launch_like_one_before_goes_to_what_that_compiled(kernel, function, compiled):
    launch(kernel)
    ((grid, _, constants),) = function.calls
    assert grid == (4, 32)
    assert (constants["FLAG"], constants["BLOCK"]) == (True, 32)
    assert compiled.calls == []
    x, out = launch(kernel, scale=0.25)
    assert len(function.calls) == 1
    ((grid, arguments, constants),) = compiled.calls
    assert grid == (4, 32, 1)
    assert arguments[0] is x
    assert arguments[1] is out
    assert arguments[2:] == [4, 0.25, True, 32]
    assert constants == {}


@pytest.mark.parametrize(
    "change",
    [
        {"x": lambda: on_gpu(torch.float16)},
        {"out": lambda: on_gpu(torch.float16)},
        {"x": lambda: on_gpu(offset=1)},
        {"x": lambda: on_gpu(kind=OnAnother)},
        {"rows": lambda: 16},
        {"scale": lambda: 1},
        {"key": lambda: (64,)},
        {"FLAG": lambda: False},
    ],
    ids=["dtype", "another dtype", "alignment", "device", "integer", "type", "key", "constant"],
)
def test_what_differs_is_launched_anew(kernel, function, compiled, change):
    changed = {name: make() for name, make in change.items()}
    launch(kernel)
    launch(kernel, **changed)
    assert len(function.calls) == 2
    assert compiled.calls == []
    launch(kernel)
    launch(kernel, **changed)
    assert len(function.calls) == 2
    assert len(compiled.calls) == 2


def test_another_setting_of_tuning_is_launched_anew(kernel, function, compiled, monkeypatch, tmp_path):
    launch(kernel)
    monkeypatch.setenv(_tuning.VARIABLE, str(tmp_path))
    launch(kernel)
    assert len(function.calls) == 2
    assert compiled.calls == []


def test_what_tuning_found_is_remembered(function, compiled, capturing, monkeypatch):
    found = Config({"BLOCK": 64})
    asked = []
    monkeypatch.setattr(_tuning, "best", lambda *arguments: asked.append(arguments) or found)
    kernel = Kernel(function, [CONFIG, found], CONFIG)
    launch(kernel)
    launch(kernel)
    assert len(asked) == 1
    ((grid, arguments, _),) = compiled.calls
    assert grid == (4, 64, 1)
    assert arguments[-1] == 64


def test_nothing_is_remembered_while_a_graph_is_captured(kernel, function, compiled, capturing):
    capturing.now = True
    launch(kernel)
    launch(kernel)
    assert len(function.calls) == 2
    capturing.now = False
    launch(kernel)
    assert len(function.calls) == 3
    assert compiled.calls == []
    capturing.now = True  # what was remembered before serves
    launch(kernel)
    assert len(function.calls) == 3
    assert len(compiled.calls) == 1


def test_so_many_are_remembered(kernel, function, monkeypatch):
    monkeypatch.setattr(_launch, "_MOST_READY", 2)
    for rows in (1, 2, 3, 4, 5):
        launch(kernel, rows=rows)
        assert len(kernel._ready) <= 2
    launch(kernel, rows=5)
    assert len(function.calls) == 5


def test_descriptors_are_made_of_the_tensors_that_are_given(kernel, function, compiled):
    def tiles():
        return Tiles(on_gpu(), (4, 16), 16, ("BLOCK", "BLOCK"))

    launch(kernel, tiles())
    again = tiles()
    launch(kernel, again)
    ((_, (first, *_), _),) = function.calls
    ((_, (second, *_), _),) = compiled.calls
    assert isinstance(second, TensorDescriptor)
    assert second.base is again.tensor
    for name in ("shape", "strides", "block_shape"):
        assert list(getattr(second, name)) == list(getattr(first, name)), name
    launch(kernel, Tiles(on_gpu(), (2, 16), 16, ("BLOCK", "BLOCK")))
    assert len(function.calls) == 2
