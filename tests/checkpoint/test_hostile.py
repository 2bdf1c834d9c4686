"""Files made to exhaust memory or time, run code, or control the terminal: each gives one error at once."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mplug2_fast as mf
from mplug2_fast.checkpoint import inspect, pickles, torch_file, vocabulary_path
from mplug2_fast.checkpoint.torch_file import LEGACY_MAGIC
from mplug2_fast.text import Tokenizer

TINY = Path(mf.__file__).parent / "data" / "tiny"
ROOM = 2**30
BLOCKS = "visual_encoder.visual.transformer.resblocks"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(TINY / "model.safetensors")


@contextmanager
def little_memory() -> Iterator[None]:
    """A gigabyte more than is used now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refusal(path: Path, **options: str) -> str:
    """The message of the error, which must have no control characters."""
    with little_memory(), pytest.raises(mf.CheckpointError) as caught:
        mf.from_pretrained(path, **options)
    message = str(caught.value)
    assert all(character.isprintable() or character == "\n" for character in message)
    assert len(message) < 10_000
    return message


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_DEFLATED, **entries: bytes) -> Path:
    """A torch.save file with this pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        for name, content in entries.items():
            file.writestr(f"archive/{name}", content)
    return path


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


TENSOR = called(
    named("torch._utils", "_rebuild_tensor_v2"),
    b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x01tQ",
    b"K\x00J\xff\xff\xff\x7f\x85K\x00\x85\x89" + called(named("collections", "OrderedDict")),
)
# Each hash of a nested tuple hashes both of its halves.
DOUBLED = b")" + b"2\x86" * 200
BOMBS = {
    "bytearray": called(named("builtins", "bytearray"), b"J\xff\xff\xff\x7f"),
    "hex": text("a") + b"".join(b"q\0" + called(named("_codecs", "encode"), b"h\0", text("hex")) for _ in range(50)),
    "storage": called(named("torch", "FloatStorage"), b"J\xff\xff\xff\x7f"),
    "tensor": called(named("torch", "Tensor"), b"J\xff\xff\xff\x7f"),
    "memo": b"}r\xff\xff\xff\xff",
    "claimed string": b"X\xff\xff\xff\xffabc",
    "claimed bytes": b"\x8e" + struct.pack("<Q", 2**40),
    "claimed bytearray": b"\x96" + struct.pack("<Q", 2**33),
    "claimed frame": b"\x95" + struct.pack("<Q", 2**40),
    "deep": b"]" * 100_000 + b"a" * 99_999,
    "deep tuples": b")" + b"\x85" * 100_000,
    "tuple as a key": b"}" + DOUBLED + b"K\x01s",
    "set of tuples": called(named("builtins", "set"), b"]" + DOUBLED + b"a"),
    "counter of tuples": called(named("collections", "Counter"), b"]" + DOUBLED + b"a"),
    "pairs": called(named("collections", "OrderedDict"), b"]]" + DOUBLED + b"aK\x01aa"),
    "expanded tensor": b"}" + text("model") + b"}" + text("visn_emb_norm.weight") + TENSOR + b"ss",
    "numpy": called(named("numpy._core.multiarray", "_reconstruct"), b"J\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickles_that_take_memory_or_time(tmp_path, kind, legacy):
    path = tmp_path / "weights.pth"
    if legacy:
        system = pickle.dumps({"little_endian": True}, 2)
        path.write_bytes(LEGACY_MAGIC + pickle.dumps(1001, 2) + system + b"\x80\x02" + BOMBS[kind] + b".\x80\x02].")
    else:
        archive(path, b"\x80\x02" + BOMBS[kind] + b".", **{"data/0": bytes(4)})
    refusal(path)


def test_pickles_that_never_end(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_READS", 10_000)
    assert "it is larger" in refusal(archive(tmp_path / "weights.pth", b"\x80\x02" + b"]" * 20_000 + b"."))


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "os system",
        "posix system",
        "subprocess Popen",
        "torch.hub load",
        "copyreg _reconstructor",
    ],
)
def test_names_that_could_run_code(tmp_path, name):
    path = archive(tmp_path / "weights.pth", b"\x80\x02" + called(named(*name.split()), text("x")) + b".")
    assert f"refused: its pickle holds {name.replace(' ', '.')}" in refusal(path)


@pytest.mark.parametrize(
    "pickled",
    [
        named("argparse", "Namespace") + b"}" + text("__init__") + b"K\x01sN\x86b",
        called(named("torch._utils", "_rebuild_tensor_v2"), b"K\x01"),
        called(named("argparse", "Namespace")) + b")R",
        b"K\x01)\x81",
    ],
)
def test_pickles_change_nothing(tmp_path, pickled):
    before = dict(vars(__import__("argparse").Namespace))
    refusal(archive(tmp_path / "weights.pth", b"\x80\x02" + pickled + b"."))
    assert dict(vars(__import__("argparse").Namespace)) == before


def test_a_pickle_that_unpacks_to_gigabytes(tmp_path):
    path = tmp_path / "weights.pth"
    archive(path, b"0" * (80 * 2**20))
    assert "its data.pkl has 83,886,080 bytes, more than any checkpoint has" in refusal(path)


def test_weights_that_unpack_to_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_MAX_UNPACKED_BYTES", 2**20)
    path = tmp_path / "weights.pth"
    torch.save({"model": {"visn_emb_norm.weight": torch.zeros(2**20)}}, path)
    repack(path)
    assert "unpack to more than 20 times its size" in refusal(path)


def test_an_archive_with_an_endless_directory(tmp_path):
    path = tmp_path / "weights.pth"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(2**31)
        file.seek(2**31)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 100, 100, 2**31 - 100, 100, 0))
    assert "its directory is larger" in refusal(path)


def test_archives_that_contradict_themselves(tmp_path, weights):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("archive/data.pkl", b"\x80\x02].")
    assert "the same name" in refusal(path)
    archive(path, b"\x80\x02}.", **{"data/0": bytes(100)})
    content = bytearray(path.read_bytes())
    second = content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = bytes(4)  # begins where the first one does
    path.write_bytes(content)
    assert "overlap" in refusal(path)
    archive(path, b"\x80\x02}.", zipfile.ZIP_STORED, **{"constants.pkl": b"\x80\x02)."})
    assert "TorchScript" in refusal(path)


def test_tensors_that_repeat_a_few_numbers(tmp_path, weights):
    path = tmp_path / "weights.pth"
    torch.save({key: torch.zeros(()).expand(tensor.shape) for key, tensor in weights.items()}, path)
    assert "they repeat numbers" in refusal(path)


@pytest.mark.parametrize("number", ["30000000", "9" * 5000, "-1", "007", "١"])
@pytest.mark.parametrize(
    "key", ["visual_encoder.visual.transformer.resblocks.{}.ln_1.bias", "text_encoder.encoder.layer.{}.latents"]
)
def test_numbers_of_layers(tmp_path, weights, key, number):
    torch.save({"model": weights | {key.format(number): torch.zeros(1)}}, tmp_path / "weights.pth")
    refusal(tmp_path / "weights.pth", task="captioning")


def test_more_layers_than_a_model_has(tmp_path, weights):
    key = f"{BLOCKS}.5000.ln_1.bias"
    torch.save({"model": weights | {key: torch.zeros(1)}}, tmp_path / "weights.pth")
    assert "layers must be at most 1,000, got 5001" in refusal(tmp_path / "weights.pth", task="captioning")


FIELDS = {
    "vision": {"layers": 10**12, "image_size": 8 * 10**11, "width": "wide", "layer_norm_eps": "x", "patch_size": 0},
    "text": {"hidden_dropout_prob": 7, "vocab_size": True, "layer_norm_eps": float("nan"), "stride_layer": 1e3},
    "generation": {"num_beams": "x", "prompt": "\x1b]0;owned\x07", "prompt_length": -1, "max_length": [1]},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "folder"))


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, fields in FIELDS.items() for name in fields])
def test_configurations_that_no_model_has(folder, part, name):
    config = json.loads((folder / "config.json").read_text())
    config[part][name] = FIELDS[part][name]
    (folder / "config.json").write_text(json.dumps(config))
    assert name in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 200_000,
        '{"vision": ' * 50_000,
        '{"vision": {"layers": ' + "9" * 5000 + "}}",
        '{"vision": {}, "vision": {}}',
        '{"vision": [[1]]}',
        '{"\\u001b]0;owned\\u0007": 1}',
        '{"task": "\\u001b]0;owned\\u0007"}',
        " " * (2**20 + 1),
        "\udcff",
    ],
)
def test_damaged_configurations(folder, content):
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    refusal(folder)
    save_file(
        {"x": torch.zeros(1)},
        folder.parent / "a.safetensors",
        metadata={"mplug2_config": content.replace("\udcff", "{")},
    )
    refusal(folder.parent / "a.safetensors")


def test_a_byte_order_mark_is_no_harm(folder):
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    assert mf.from_pretrained(folder, pack=False).config.vision.layers == 3


def test_safetensors_with_a_header_without_end(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((2**30).to_bytes(8, "little") + b"{")
        file.truncate(2**30 + 100)
    assert "its header has 1,073,741,824 bytes" in refusal(path)
    path.write_bytes((400_000).to_bytes(8, "little") + b'{"a":' * 80_000)
    refusal(path)


def test_what_is_not_a_file(tmp_path, folder):
    os.mkfifo(tmp_path / "pipe.pth")
    assert "a named pipe, not a file" in refusal(tmp_path / "pipe.pth")
    assert "a device, not a file" in refusal(Path("/dev/zero"))
    for name in ("config.json", "model.safetensors"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert f"{name}: a named pipe" in refusal(folder)
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        assert f"{name}: a device" in refusal(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(kept)
    refusal(Path("~nobody-of-this-name/a.pth"))
    refusal(tmp_path / ("x" * 300))
    refusal(tmp_path / "a\0b")


EVIL = "x\n\x1b]0;owned\x07\x9b31m\u202e all is well"


def test_names_do_not_reach_the_terminal(tmp_path, folder, weights):
    path = tmp_path / "weights.pth"
    torch.save({EVIL: torch.zeros(1)}, path)
    assert r"\n\x1b]0;owned\x07" in refusal(path)
    torch.save({"model": {EVIL: 3}}, path)
    refusal(path)
    torch.save({"model": weights, EVIL: 3}, path)
    assert all(name.isprintable() for name in inspect(path).others)
    torch.save({EVIL: 3}, path)
    refusal(path)
    save_file({EVIL: torch.zeros(1)}, tmp_path / "a.safetensors")
    refusal(tmp_path / "a.safetensors")
    archive(path, b"\x80\x02" + named("os\x1b]0;owned\x07", "system") + b".")
    refusal(path)
    torch.save({"model": {"a" * 10_000: torch.zeros(1)}}, path)
    refusal(path)
    (folder / "model.safetensors").unlink()
    (folder / EVIL.replace("\n", "")).write_bytes(b"")
    refusal(folder)


KINDS = {
    "sparse": lambda tensor: tensor.float().to_sparse(),
    "meta": lambda tensor: torch.empty_like(tensor, device="meta"),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor[0].float()]),
    "complex64": lambda tensor: tensor.to(torch.complex64),
    "float8_e4m3fn": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "int8": lambda tensor: tensor.to(torch.int8),
    "bool": lambda tensor: tensor.bool(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_not_weights(tmp_path, weights, kind):
    key = "text_decoder.bert.embeddings.word_embeddings.weight"
    changed = weights | {key: KINDS[kind](weights[key])}
    torch.save({"model": changed}, tmp_path / "weights.pth")
    message = refusal(tmp_path / "weights.pth", task="captioning")
    assert key in message
    assert kind in message
    with pytest.raises(mf.CheckpointError, match=key):
        mf.load_released(mf.MPlug2ForCaptioning(mf.MPlug2Config.preset("tiny")), changed)


def mutations(content: bytes, count: int, structure: int) -> Iterator[bytes]:
    """Flipped bits, cut ends, inserted and repeated bytes, within the first and the last `structure` bytes."""
    chosen = random.Random(count)

    def place() -> int:
        inside = chosen.randrange(min(structure, len(content)))
        return inside if chosen.random() < 0.5 else len(content) - 1 - inside

    for number in range(count):
        changed, at = bytearray(content), place()
        if number % 4 == 0:
            del changed[at:]
        elif number % 4 == 1:
            changed[at:at] = changed[at : at + chosen.choice((1, 8, 100))]
        elif number % 4 == 2:
            changed[at : at + 4] = chosen.choice((b"\xff\xff\xff\xff", bytes(4), b"\xff\xff\xff\x7f"))
        else:
            changed[at] ^= 1 << chosen.randrange(8)
        yield bytes(changed)


@pytest.mark.parametrize(
    "form", ["zip.pth", "packed.pth", "legacy.pth", "model.safetensors", "config.json", "vocab.txt"]
)
def test_mutated_files_load_or_are_refused(tmp_path, folder, weights, form):
    few = dict(list(weights.items())[:40])
    path = folder / form if form.startswith(("model", "config", "vocab")) else tmp_path / form
    if path.suffix == ".pth":
        torch.save({"model": few, "epoch": 3}, path, _use_new_zipfile_serialization=form != "legacy.pth")
    if form == "packed.pth":
        repack(path)

    def opened(path: Path) -> object:
        return Tokenizer.from_vocab(vocabulary_path(path)) if form == "vocab.txt" else inspect(path)

    messages = []
    for content in mutations(path.read_bytes(), 40, 20_000):
        path.write_bytes(content)
        try:
            opened(path if path.suffix == ".pth" else folder)
        except mf.MPlug2Error as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all(character.isprintable() or character == "\n" for character in "".join(messages))


def repack(path: Path) -> None:
    """Pack an archive again, compressed."""
    with zipfile.ZipFile(path) as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(name, content)
