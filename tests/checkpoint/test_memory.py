"""A file that is far larger than the model loads and converts within little more than the model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast.checkpoint import official_names
from mplug2_fast.checkpoint.pages import PageReleaser

MIB = 2**20
CONFIG = mf.MPlug2Config.preset("tiny").replace(
    width=512,
    layers=6,
    hidden_size=512,
    num_attention_heads=8,
    intermediate_size=2048,
    vocab_size=20_000,
    stored_layers=12,
    fusion_layers=3,
    text_encoder_layers=6,
    text_decode_layers=6,
)
# Peak memory beyond what the process had after its imports, in bytes.
MEASURE = """
import sys, torch
import mplug2_fast as mf
from mplug2_fast.checkpoint import convert
from mplug2_fast.models import mplug2

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

action, path = sys.argv[1:]
torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)
before = status("VmRSS")
if action == "load":
    kept = mf.from_pretrained(path, task="captioning", dtype=torch.bfloat16, pack=False)
else:
    convert(path, path + ".converted", task="question_answering")
print(status("VmHWM") - before)
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures through /proc")


@pytest.fixture(scope="module", params=["pth", "safetensors"])
def large_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All of question answering in float32; in the `.pth` an optimizer state beside it."""
    path = tmp_path_factory.mktemp("large") / f"checkpoint.{request.param}"
    weights = {
        key: torch.full(shape, 0.5) for key, shape in official_names(CONFIG, "question_answering").needed.items()
    }
    if request.param == "pth":
        twin = "text_decoder.cls.predictions.decoder.weight"
        weights[twin] = weights["text_decoder.bert.embeddings.word_embeddings.weight"]
        torch.save({"model": weights, "optimizer": {k: v + 1 for k, v in weights.items() if "fusion" in k}}, path)
    else:
        from safetensors.torch import save_file

        save_file(weights, path)
    yield path
    path.unlink()


def size(task: str, itemsize: int) -> int:
    return itemsize * sum(torch.Size(shape).numel() for shape in official_names(CONFIG, task).needed.values())


def peak(action: str, path: Path) -> int:
    command = [sys.executable, "-c", MEASURE, action, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(mf.__file__).parent.parent)
    return int(done.stdout.split()[-1])


def test_loading_holds_the_model_and_little_more(large_file):
    # Beside the model: one float32 tensor (39 MiB, twice where it has a twin) and what any process needs.
    limit = size("captioning", 2) + 110 * MIB
    assert limit < 0.7 * (size("captioning", 2) + size("captioning", 4)) < large_file.stat().st_size
    assert peak("load", large_file) < limit


def test_converting_holds_a_tensor_at_a_time(large_file):
    limit = 110 * MIB
    assert limit < 0.5 * size("question_answering", 4)
    assert peak("convert", large_file) < limit


def test_released_pages_are_read_again(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.arange(300_000.0), "b": torch.arange(7.0)}, path)
    mapped = torch.load(path, mmap=True)
    release = PageReleaser(path)
    for tensor in (*mapped.values(), mapped["a"][5_000:9_000], mapped["a"][:0]):
        release(tensor)
    assert torch.equal(mapped["a"], torch.arange(300_000.0))
    assert torch.equal(mapped["b"], torch.arange(7.0))


def test_memory_that_is_no_file_is_left_alone(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(300_000)}, path)
    mapped = torch.load(path, mmap=True)
    release = PageReleaser(path)
    ours = torch.arange(3_000_000.0)
    release(ours)
    assert torch.equal(ours, torch.arange(3_000_000.0))
    assert not mapped["a"].any()
