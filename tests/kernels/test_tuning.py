"""What tuning times, stores, reads and leaves out, with a simulated GPU and clock."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton

from mplug2_fast.kernels import _tuning, linear_act
from mplug2_fast.kernels._launch import record
from mplug2_fast.kernels._tuning import Config, Race


class Text:
    """A kernel's version, as its hash sees it."""

    def __init__(self, cache_key: str) -> None:
        self.cache_key = cache_key


GPU = torch.device("cuda", 0)
CONFIGS = [Config({"BLOCK": 16}, num_warps=2), Config({"BLOCK": 32}), Config({"BLOCK": 64}, num_stages=3)]
KERNEL = SimpleNamespace(name="kernel", function=Text("0123456789abcdef"))
KEY = ("bfloat16", ("CAUSAL", True), 4096)


class Clock:
    """Returns the given milliseconds for each configuration, or for each way of a race."""

    def __init__(self) -> None:
        self.milliseconds: dict[object, float] = {16: 3.0, 32: 1.0, 64: 2.0}
        self.launched: list[object] = []
        self.timed = 0

    def launch(self, config: Config) -> None:
        self.launched.append(config.constants["BLOCK"])

    def way(self, name: str):
        return lambda: self.launched.append(name)

    def device_milliseconds(self, function, _: torch.device) -> float:
        self.timed += 1
        function()
        found = self.milliseconds[self.launched[-1]]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def clock(monkeypatch, tmp_path):
    made = Clock()
    monkeypatch.setattr(_tuning, "device_milliseconds", made.device_milliseconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Made up/GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv(_tuning.VARIABLE, str(tmp_path))
    forget()
    yield made
    forget()


def forget() -> None:
    """Forgets everything, like a new process."""
    for cached in (_tuning._open, _tuning._device_table, _tuning._device_name, _tuning._source, _tuning._entry):
        cached.cache_clear()


def best(clock: Clock, kernel=KERNEL, configs=CONFIGS, key=KEY) -> Config:
    return _tuning.best(kernel, configs, GPU, key, clock.launch)


def file(folder):
    (found,) = folder.glob("*.json")
    return found


def test_the_fastest_is_kept(clock, tmp_path):
    assert best(clock) == CONFIGS[1]
    assert clock.timed == 3
    assert best(clock) == CONFIGS[1]
    assert clock.timed == 3
    assert file(tmp_path).name == f"Made up-GPU, triton {triton.__version__}.json"
    (entry,) = json.loads(file(tmp_path).read_text()).items()
    assert entry == (
        "kernel 0123456789ab bfloat16 ('CAUSAL', True) 4096",
        {"constants": {"BLOCK": 32}, "num_warps": 4, "num_stages": 2, "milliseconds": 1.0},
    )


def test_the_next_process_reads_it(clock):
    best(clock)
    forget()
    assert best(clock) == CONFIGS[1]
    assert clock.timed == 3


def test_an_edited_file_counts(clock, tmp_path):
    best(clock)
    text = file(tmp_path).read_text().replace('"BLOCK": 32', '"BLOCK": 128').replace('"num_warps": 4', '"num_warps": 8')
    file(tmp_path).write_text(text)
    forget()
    assert best(clock) == Config({"BLOCK": 128}, num_warps=8)
    assert clock.timed == 3


@pytest.mark.parametrize(
    "change",
    [
        {"key": ("float16", *KEY[1:])},
        {"kernel": SimpleNamespace(name="kernel", function=Text("f" * 16))},
    ],
    ids=["another key", "another text"],
)
def test_what_differs_is_timed_anew(clock, tmp_path, change):
    best(clock)
    clock.milliseconds[64] = 0.5
    assert best(clock, **change) == CONFIGS[2]
    assert best(clock) == CONFIGS[1]
    assert len(json.loads(file(tmp_path).read_text())) == 2


def test_processes_that_share_a_file_lose_nothing(clock, tmp_path):
    best(clock)
    mine = _tuning._table(GPU)
    forget()
    best(clock, key=("another process's",))
    mine.put("mine", {"a": 1})
    written = json.loads(file(tmp_path).read_text())
    assert len(written) == 3
    assert "kernel 0123456789ab another process's" in written
    assert list(tmp_path.iterdir()) == [file(tmp_path)], "nothing half-written is left"


def test_off(clock, tmp_path, monkeypatch):
    monkeypatch.setenv(_tuning.VARIABLE, "off")
    assert best(clock) == CONFIGS[0]
    assert clock.timed == 0
    assert list(tmp_path.iterdir()) == []


def test_by_default_the_file_is_in_the_users_cache(clock, monkeypatch, tmp_path):
    monkeypatch.delenv(_tuning.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    best(clock)
    assert file(tmp_path / "cache" / "mplug2_fast" / "tuning").exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _tuning.folder() == tmp_path / "home" / ".cache" / "mplug2_fast" / "tuning"


def test_nothing_is_tried_while_a_graph_is_captured(clock, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert best(clock) == CONFIGS[0]
    assert clock.timed == 0
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_passed_over(clock):
    clock.milliseconds[32] = triton.runtime.errors.OutOfResources(300, 200, "shared memory")
    assert best(clock) == CONFIGS[2]


def test_where_nothing_fits_the_error_says_so(clock):
    clock.milliseconds = dict.fromkeys((16, 32, 64), triton.runtime.errors.OutOfResources(300, 200, "shared memory"))
    with pytest.raises(RuntimeError, match=r"none of the 3 configurations of kernel fits Made up/GPU: use_backend"):
        best(clock)


@pytest.mark.parametrize(
    ("intact", "damaged"), [("{", "<"), ("num_warps", "warps")], ids=["not JSON", "a field is missing"]
)
def test_a_damaged_file_is_named(clock, tmp_path, intact, damaged):
    best(clock)
    file(tmp_path).write_text(file(tmp_path).read_text().replace(intact, damaged))
    forget()
    with pytest.raises(ValueError, match=r"Made up-GPU.* is not what tuning wrote .*: correct it or delete it"):
        best(clock)


class TestRace:
    race = Race("operator", KERNEL.function)

    def run(self, clock, device=GPU, key=KEY):
        self.race.run(device, key, clock.way("ours"), clock.way("torch's"))

    @pytest.mark.parametrize("ours", [0.02, 0.04])
    def test_is_run_once_and_remembered(self, clock, tmp_path, ours):
        clock.milliseconds = {"ours": ours, "torch's": 0.03}
        assert self.race.lost(GPU, KEY) is None
        self.run(clock)
        self.run(clock)
        assert clock.launched == ["ours", "torch's"]
        forget()
        self.run(clock)
        assert clock.timed == 2
        expected = "tuning found PyTorch's own operators faster at about these sizes: 0.03 ms against 0.04"
        assert self.race.lost(GPU, KEY) == (expected if ours == 0.04 else None)
        assert self.race.lost(GPU, ("another",)) is None
        assert clock.timed == 2
        assert json.loads(file(tmp_path).read_text()) == {
            "operator against PyTorch 0123456789ab bfloat16 ('CAUSAL', True) 4096": {
                "triton_milliseconds": ours,
                "torch_milliseconds": 0.03,
            }
        }

    def test_is_not_run_where_nothing_is_tuned(self, clock, monkeypatch):
        for device in ("cpu", "meta"):
            self.run(clock, torch.device(device))
            assert self.race.lost(torch.device(device), KEY) is None
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            self.run(clock)
        monkeypatch.setenv(_tuning.VARIABLE, "off")
        self.run(clock)
        assert self.race.lost(GPU, KEY) is None
        assert clock.timed == 0


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_record_tells_every_configuration(capability):
    """The configurations of each kernel that would be launched. None is launched."""
    rows, inputs, outputs = 4112, 64, 128
    x, weight = (torch.empty(size, inputs, dtype=torch.bfloat16, device="meta") for size in (rows, outputs))
    out = torch.empty(rows, outputs, dtype=torch.bfloat16, device="meta")
    with record(capability) as recorder:
        linear_act.forward((x, (1, rows), (0, inputs)), weight, None, "gelu", None, out)
    (launch,) = recorder.launches
    assert launch.kernel == "linear_act_forward"
    assert launch.constants["DESCRIBED"] == (capability >= 90)
    assert not launch.constants["SAVES_Z"]
    assert list(launch.configs) == linear_act._many(launch.constants, capability)
    assert len({replace(config, constants=None) for config in launch.configs}) > 1
