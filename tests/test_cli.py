"""The command line: what goes to which stream, in which order, and the exit statuses."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import mplug2_fast as mf
from mplug2_fast import cli, info
from mplug2_fast.checkpoint import save_pretrained
from mplug2_fast.cli import app
from mplug2_fast.cli.tables import names_and_values
from mplug2_fast.predict import Answerer, Captioner
from tests.bulk.files import write_clip

av = pytest.importorskip("av")

TEXT = "the red blue square circle moves left right up what does do color is it yes no"
VOCABULARY = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXT.split()]
COMMAND = [sys.executable, "-m", "mplug2_fast"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A question answering model with random weights, which serves captioning too."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "words.txt").write_text("\n".join(VOCABULARY) + "\n")
    config = mf.MPlug2Config.preset("tiny").replace(vocab_size=len(VOCABULARY), initializer_range=0.2)
    torch.manual_seed(0)
    model = mf.MPlug2ForQuestionAnswering(config)
    return str(save_pretrained(model, folder / "qa", vocab=folder / "words.txt"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips")
    return [str(write_clip(folder / f"clip {i}.mp4", "mpeg4", seed=i)) for i in range(3)]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory, clips: list[str]) -> list[str]:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("This is not a video.\n" * 100)
    whole = Path(clips[0]).read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "directory.mp4").mkdir()
    names = ["empty.mp4", "text.mp4", "truncated.mp4", "directory.mp4", "missing.mp4"]
    return [str(folder / name) for name in names]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def errors(text: str | bytes) -> list[str]:
    """The lines on standard error, without the warning of a missing native module."""
    lines = os.fsdecode(text).splitlines()
    return [line for line in lines if not line.startswith("warning: mplug2_fast runs on its PyTorch fallbacks")]


def rows(result: Result) -> list[list[str]]:
    return [line.split("\t") for line in result.stdout.splitlines()]


# --- caption and answer -----------------------------------------------------------------------------------------------


def test_caption_prints_file_tab_caption_in_order(checkpoint: str, clips: list[str]) -> None:
    result = run("caption", *clips, "--checkpoint", checkpoint, "--num-beams", "2", "--max-length", "5")
    captions = Captioner.from_pretrained(checkpoint).caption(clips, num_beams=2, max_length=5)
    assert rows(result) == [[caption.path, caption.text] for caption in captions]
    assert (result.exit_code, errors(result.stderr)) == (0, [])


def test_options_reach_the_search(checkpoint: str, clips: list[str]) -> None:
    options = ["--num-beams", "4", "--num-return", "3", "--min-length", "2", "--max-length", "3"]
    result = run("caption", clips[0], "--checkpoint", checkpoint, *options, "--dtype", "bfloat16", "--device", "cpu")
    captioner = Captioner.from_pretrained(checkpoint, dtype="bfloat16")
    (expected,) = captioner.caption(clips[0], num_beams=4, num_return=3, min_length=2, max_length=3)
    assert rows(result) == [[clips[0], text] for text, _ in expected.alternatives]
    assert len(expected.alternatives) == 3


def test_good_files_are_all_there_when_others_are_bad(checkpoint: str, clips: list[str], bad_files: list[str]) -> None:
    mixed = [bad_files[0], clips[0], *bad_files[1:4], clips[1], bad_files[4], clips[2]]
    result = run("caption", *mixed, "--checkpoint", checkpoint)
    assert result.exit_code == 2
    assert [row[0] for row in rows(result)] == clips
    told = errors(result.stderr)
    assert len(told) == len(bad_files)
    reasons = ["empty", "not a video", "truncated", "directory", "no such file"]
    for error, path, reason in zip(told, bad_files, reasons, strict=True):
        assert error.startswith(f"error: {path}: ")
        assert reason in error.removeprefix(f"error: {path}: ")


def test_json_is_one_object_a_line(checkpoint: str, clips: list[str], bad_files: list[str]) -> None:
    result = run("caption", clips[0], bad_files[0], "--checkpoint", checkpoint, "--json", "--num-return", "2")
    good, bad = (json.loads(line) for line in result.stdout.splitlines())
    (expected,) = Captioner.from_pretrained(checkpoint).caption(clips[0], num_return=2)
    fields = ["path", "text", "score", "alternatives", "frames", "decoder", "seconds", "error"]
    assert list(good) == fields == list(bad)
    assert (good["frames"], good["decoder"]) == (list(expected.frames), "pyav")
    assert (bad["frames"], bad["decoder"]) == ([], None)
    assert (good["path"], good["text"], good["error"]) == (clips[0], expected.text, None)
    assert good["score"] == pytest.approx(expected.score, abs=1e-5)
    assert good["alternatives"][0] == {"text": good["text"], "score": good["score"]}
    assert [item["text"] for item in good["alternatives"]] == [text for text, _ in expected.alternatives]
    assert list(good["seconds"]) == ["decode", "encode", "generate"]
    assert (bad["path"], bad["text"], bad["score"], bad["alternatives"]) == (bad_files[0], None, None, [])
    assert "empty" in bad["error"]
    assert result.exit_code == 2


def test_answers_are_written_freely(checkpoint: str, clips: list[str]) -> None:
    question = "What does the red square do?"
    result = run("answer", *clips, "--question", question, "--checkpoint", checkpoint)
    answers = Answerer.from_pretrained(checkpoint).answer(clips, question)
    assert rows(result) == [[answer.path, answer.text] for answer in answers]
    assert (result.exit_code, errors(result.stderr)) == (0, [])


def test_answers_are_chosen_from_candidates(checkpoint: str, clips: list[str], tmp_path: Path) -> None:
    (tmp_path / "answers.txt").write_text("up\n\n  it moves left  \n")
    options = ["--candidate", "no", "--candidates", str(tmp_path / "answers.txt"), "--num-return", "3", "--json"]
    result = run("answer", clips[0], "--question", "What is it?", "--checkpoint", checkpoint, *options)
    found = json.loads(result.stdout)
    assert found["question"] == "What is it?"
    (expected,) = Answerer.from_pretrained(checkpoint).answer(
        clips[0], "What is it?", ["no", "up", "it moves left"], num_return=3
    )
    assert [item["text"] for item in found["alternatives"]] == [text for text, _ in expected.alternatives]
    assert sum(item["score"] for item in found["alternatives"]) == pytest.approx(1)


def test_without_a_checkpoint_it_is_the_tiny_model_and_says_so() -> None:
    clip = str(Path(__file__).parents[1] / "examples" / "moving_shapes" / "clips" / "red_square_moves_left.mp4")
    captioned = run("caption", clip)
    ((path, text),) = rows(captioned)
    assert path == clip
    assert text.startswith("a red ")
    answered = run("answer", clip, "--question", "What color is the shape?")
    assert rows(answered) == [[clip, "red"]]
    for result in (captioned, answered):
        assert result.exit_code == 0
        (note,) = errors(result.stderr)
        assert note.startswith("note: this is the included tiny model")


def test_warnings_are_one_line_on_standard_error(
    checkpoint: str, clips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = mf.Captioner.encode

    def slow(captioner: mf.Captioner, videos: torch.Tensor) -> tuple[torch.Tensor, float]:
        warnings.warn("something\nis slow", RuntimeWarning, stacklevel=2)
        return encode(captioner, videos)

    monkeypatch.setattr(mf.Captioner, "encode", slow)
    result = run("caption", clips[0], "--checkpoint", checkpoint)
    assert (result.exit_code, result.stderr) == (0, "warning: something is slow\n")
    assert len(rows(result)) == 1


# --- convert, inspect, info -------------------------------------------------------------------------------------------


def test_convert_writes_what_inspect_then_describes(checkpoint: str, clips: list[str], tmp_path: Path) -> None:
    target = str(tmp_path / "converted")
    result = run("convert", checkpoint, target, "--task", "captioning", "--dtype", "bfloat16")
    assert (result.exit_code, errors(result.stderr)) == (0, [])
    assert result.stdout.startswith(f"{target}\tcaptioning, ")
    assert result.stdout.endswith("bfloat16\n")

    described = run("inspect", target)
    assert described.exit_code == 0
    facts = dict(line.split(maxsplit=1) for line in described.stdout.split("\n\n")[0].splitlines())
    assert (facts["task"], facts["dtype"]) == ("captioning", "bfloat16")
    found = json.loads(run("inspect", target, "--json").stdout)
    assert (found["ok"], found["task"], found["dtypes"]) == (True, "captioning", {"bfloat16": found["entries"]})
    assert run("caption", clips[0], "--checkpoint", target).exit_code == 0


def test_inspect_tells_what_is_missing(checkpoint: str, tmp_path: Path) -> None:
    target = str(tmp_path / "captioning")
    assert run("convert", checkpoint, target, "--task", "captioning").exit_code == 0
    result = run("inspect", target, "--task", "question_answering")
    assert result.exit_code == 2
    assert "missing" in result.stdout
    assert result.stderr.startswith(f"error: {target}")
    assert "fusion_encoder" in result.stderr
    refused = run("answer", "x.mp4", "--question", "What?", "--checkpoint", target)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"error: {target}")


def test_a_file_that_is_no_checkpoint(clips: list[str]) -> None:
    for command in (["inspect", clips[0]], ["caption", clips[0], "--checkpoint", clips[0]]):
        result = run(*command)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: {clips[0]}: ")


def test_info_as_a_table_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    device = {"name": "H200", "capability": "9.0", "memory": 3 * 2**30}
    found = {"system": "Linux", "memory": {"total": 2**31}, "cuda": {"devices": [device], "reason": None}, "simd": []}
    monkeypatch.setattr(info, "collect", lambda: found)
    assert json.loads(run("info", "--json").stdout) == found
    table = [line.split("  ") for line in run("info").stdout.splitlines()]
    assert [[cell.strip() for cell in row if cell.strip()] for row in table] == [
        ["system", "Linux"],
        ["memory", "total", "2.0 GiB"],
        ["cuda", "device 0 name", "H200"],
        ["device 0 capability", "9.0"],
        ["device 0 memory", "3.0 GiB"],
        ["reason", "none"],
        ["simd", "none"],
    ]


def test_info_of_this_machine() -> None:
    result = run("info")
    assert (result.exit_code, errors(result.stderr)) == (0, [])
    assert torch.__version__ in result.stdout
    assert list(json.loads(run("info", "--json").stdout)) == list(info.collect())


def test_version() -> None:
    assert run("--version").stdout == f"mplug2-fast {mf.__version__}\n"


# --- as a process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "asked"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)])
def test_activations_lie_in_huge_pages_unless_that_is_forbidden(
    given: dict[str, str], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    monkeypatch.setattr(os, "environ", others | given)
    found = []
    monkeypatch.setattr(cli, "prepare_streams", lambda: None)
    monkeypatch.setattr(cli, "app", lambda: found.append(info.collect()["torch"]["asks_for_huge_pages"]))
    cli.main()
    assert found == [asked]


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from mplug2_fast.cli import app\n"
        "for command in ([], ['caption'], ['answer'], ['features'], ['convert'], ['inspect'], ['info']):\n"
        "    assert CliRunner().invoke(app, [*command, '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'numpy', 'av', 'tokenizers', 'safetensors'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"


def test_file_names_of_any_bytes_come_back_as_they_were(checkpoint: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "ä\udcff.mp4", tmp_path / "\udcff\n\t.mp4"
    write_clip(tmp_path / "clip.mp4", "mpeg4", seed=0).rename(good)
    command = [*COMMAND, "caption", str(good), str(bad), "--checkpoint", checkpoint]
    finished = subprocess.run(command, capture_output=True, check=False)
    assert finished.returncode == 2
    assert finished.stdout.startswith(os.fsencode(good) + b"\t")
    assert errors(finished.stderr) == [f"error: {tmp_path}/\udcff\\n\\t.mp4: no such file"]


def test_a_reader_that_goes_away_ends_it_quietly(checkpoint: str, clips: list[str]) -> None:
    command = [*COMMAND, "caption", *clips * 50, "--checkpoint", checkpoint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(os.fsencode(clips[0]))
        process.stdout.close()
        assert errors(process.stderr.read()) == []
        assert process.wait(timeout=240) == 141


def test_an_interrupt_ends_it_quietly(checkpoint: str, clips: list[str]) -> None:
    command = [*COMMAND, "caption", *clips * 2000, "--checkpoint", checkpoint]
    # A shell that runs the tests in the background has them, and what they start, ignore interrupts.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heard) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=240)
    assert (process.returncode, errors(told)) == (130, [])


@pytest.mark.parametrize(
    ("argument", "output", "reason"),
    [
        ("--version", ">&-", "standard output is closed"),
        ("--help", "> /dev/full", "No space left on device"),
        ("data list", "> /dev/full", "No space left on device"),
    ],
)
def test_a_standard_output_that_takes_nothing(argument: str, output: str, reason: str) -> None:
    command = f"{shlex.join(COMMAND)} {argument} {output}"
    finished = subprocess.run(command, shell=True, stderr=subprocess.PIPE, check=False)
    assert finished.returncode == 2
    assert errors(finished.stderr) == [f"error: the results cannot be written: {reason}"]


def test_streams_that_are_closed_do_not_become_other_files(clips: list[str], tmp_path: Path) -> None:
    """If standard error is closed, the next opened file would get its number, and the messages."""
    out = tmp_path / "a.jsonl"
    bulk = shlex.join([*COMMAND, "caption", *clips, "--out", str(out), "--device", "cpu"])
    assert subprocess.run(f"{bulk} <&- >&- 2>&-", shell=True, check=False).returncode == 0
    assert [json.loads(line)["path"] for line in out.read_text().splitlines()] == clips
    closed = shlex.join([*COMMAND, "caption", "-", "--out", str(tmp_path / "b.jsonl")])
    finished = subprocess.run(f"{closed} <&-", shell=True, stderr=subprocess.PIPE, check=False)
    assert (finished.returncode, errors(finished.stderr)) == (2, ["error: -: standard input is closed"])


def test_an_instruction_set_that_does_not_exist(native_module: object, clips: list[str]) -> None:
    environment = {**os.environ, "MPLUG2_FAST_ISA": "nonsense"}
    command = [*COMMAND, "caption", clips[0], "--device", "cpu"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert errors(finished.stderr)[-1].startswith(
        "error: MPLUG2_FAST_ISA: there is no instruction set nonsense: choose portable"
    )
    assert len(errors(finished.stderr)) == 2  # the note on the tiny model is the other


def test_nothing_speaks_to_the_terminal(checkpoint: str) -> None:
    result = run("caption", "x\x1b]0;owned\x07\x9b1m.mp4", "--checkpoint", checkpoint)
    assert result.stderr == "error: x\\x1b]0;owned\\x07\\x9b1m.mp4: no such file\n"
    table = names_and_values([("a\x1b[1m", "b\nc\x07")])
    assert table.split() == ["a\\x1b[1m", "b\\nc\\x07"]


def test_progress_is_shown_on_a_terminal_only_and_never_in_the_results(checkpoint: str, clips: list[str]) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    command = [*COMMAND, "caption", *clips, "--checkpoint", checkpoint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = read_all(ours)
        results = process.stdout.read()
    assert process.returncode == 0
    assert "loading the model" in shown
    assert "clip 1.mp4 (2 of 3)" in shown
    captions = Captioner.from_pretrained(checkpoint).caption(clips)
    assert results.decode() == "".join(f"{caption.path}\t{caption.text}\n" for caption in captions)


def read_all(terminal: int) -> str:
    """What was written to the other end until it was closed, which a terminal reports as an error."""
    chunks = []
    with open(terminal, "rb", buffering=0) as stream, contextlib.suppress(OSError):
        while chunk := stream.read(4096):
            chunks.append(chunk)
    return b"".join(chunks).decode()
