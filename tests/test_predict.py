"""From files to results: their contents and order, and the effect of a bad file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mplug2_fast as mf
from mplug2_fast.checkpoint import save_pretrained
from mplug2_fast.errors import CheckpointError, ConfigError, MPlug2Error, VideoError
from mplug2_fast.predict import Answerer, Captioner, Result, predictor
from mplug2_fast.tasks import question_answering
from mplug2_fast.text import Tokenizer
from mplug2_fast.video.frames import PreparedClip
from mplug2_fast.video.limits import Guard
from mplug2_fast.video.preparation import MPLUG2, Preparation
from tests.bulk.files import write_clip

TEXT = "a video of the red blue square circle moves left right up what does do color is it yes no"
VOCABULARY = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXT.split()]
CONFIG = mf.MPlug2Config.preset("tiny").replace(vocab_size=len(VOCABULARY))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(VOCABULARY)


@pytest.fixture(scope="module")
def model() -> mf.MPlug2ForQuestionAnswering:
    torch.manual_seed(0)
    return mf.MPlug2ForQuestionAnswering(CONFIG.replace(initializer_range=0.2)).eval()


@pytest.fixture
def captioner(model: mf.MPlug2ForQuestionAnswering, tokenizer: Tokenizer) -> Captioner:
    return Captioner(model.captioner(), tokenizer)


@pytest.fixture
def answerer(model: mf.MPlug2ForQuestionAnswering, tokenizer: Tokenizer) -> Answerer:
    return Answerer(model, tokenizer)


def pixels(path: str) -> torch.Tensor:
    """The video of an imaginary file, different for every name."""
    noise = torch.Generator().manual_seed(sum(path.encode()))
    return torch.randn(3, 4, 32, 32, generator=noise)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces decoding: names become noise, and names with `bad` cannot be read. Records the calls."""
    asked: list[str] = []

    def load(path: str, preparation: Preparation, num_frames: int, image_size: int, guard: Guard) -> PreparedClip:
        assert preparation == MPLUG2
        assert (num_frames, image_size) == (4, 32)
        asked.append(path)
        if "bad" in path:
            raise VideoError(f"{path}: is truncated:\n it has 3 bytes of 4")
        return PreparedClip(pixels(path), [1, 3, 5, 7], (640, 360), "pyav")

    monkeypatch.setattr(predictor, "prepare_clip", load)
    return asked


def hypotheses(tokenizer: Tokenizer, output: mf.GenerationOutput) -> list[tuple[str, float]]:
    rows = zip(output.sequences[0], output.scores[0], strict=True)
    return [(tokenizer.decode(ids), score.item()) for ids, score in rows]


# --- captions ---------------------------------------------------------------------------------------------------------


def test_captions_are_what_the_model_generates(
    loaded: list[str], captioner: Captioner, model: mf.MPlug2ForQuestionAnswering, tokenizer: Tokenizer
) -> None:
    options = {"num_beams": 3, "num_return": 2, "min_length": 2, "max_length": 6}
    results = list(captioner.caption(["one.mp4", Path("two.mp4")], **options))
    assert [result.path for result in results] == ["one.mp4", "two.mp4"] == loaded
    for result in results:
        expected = hypotheses(tokenizer, model.captioner().generate(pixels(result.path)[None], **options))
        assert [text for text, _ in result.alternatives] == [text for text, _ in expected]
        assert [score for _, score in result.alternatives] == pytest.approx([score for _, score in expected], abs=1e-5)
        assert (result.text, result.score) == result.alternatives[0]
        assert (result.frames, result.decoder, result.error) == ((1, 3, 5, 7), "pyav", None)
        assert list(result.seconds) == ["decode", "encode", "generate"]
        assert min(result.seconds.values()) >= 0
    assert results[0].alternatives != results[1].alternatives


def test_one_path_is_one_file(loaded: list[str], captioner: Captioner) -> None:
    assert [result.path for result in captioner.caption("one.mp4")] == ["one.mp4"]
    assert [result.path for result in captioner.caption(Path("one.mp4"))] == ["one.mp4"]
    assert list(captioner.caption([])) == []


def test_the_models_own_defaults_are_used(captioner: Captioner) -> None:
    assert captioner.generation_options(None, 1, None, None) == {
        "num_beams": 5,
        "num_return": 1,
        "min_length": 1,
        "max_length": 12,
    }


def test_the_prompt_is_taken_off(loaded: list[str], tokenizer: Tokenizer) -> None:
    model = FixedModel(CONFIG.replace(prompt="a video of"), [["a", "video", "of", "the", "red", "square"]])
    assert [result.text for result in Captioner(model, tokenizer).caption("x.mp4")] == ["the red square"]


def test_bad_files_do_not_stop_the_others(loaded: list[str], captioner: Captioner) -> None:
    names = ["bad0.mp4", "one.mp4", "bad1.mp4", "bad2.mp4", "two.mp4"]
    results = list(captioner.caption(names))
    assert [result.path for result in results] == names
    assert [result.error is None for result in results] == [False, True, False, False, True]
    bad = results[2]
    assert bad == Result("bad1.mp4", seconds=bad.seconds, error="is truncated: it has 3 bytes of 4")
    assert list(bad.seconds) == ["decode"]


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (FileNotFoundError(2, "No such file or directory"), "No such file"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("not enough memory"), "not enough memory"),
    ],
)
def test_what_else_a_file_can_cause(
    monkeypatch: pytest.MonkeyPatch, captioner: Captioner, problem: Exception, reason: str
) -> None:
    monkeypatch.setattr(predictor, "prepare_clip", _raiser(problem))
    (result,) = captioner.caption("x.mp4")
    assert reason in result.error


def test_errors_of_the_program_are_not_taken_for_bad_files(
    monkeypatch: pytest.MonkeyPatch, captioner: Captioner
) -> None:
    monkeypatch.setattr(predictor, "prepare_clip", _raiser(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        list(captioner.caption("x.mp4"))


def _raiser(problem: Exception) -> Callable[..., PreparedClip]:
    def load(path: str, *_: object) -> PreparedClip:
        raise problem

    return load


def test_the_next_file_is_decoded_while_the_model_works(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    second_started = threading.Event()

    def load(path: str, *_: object) -> PreparedClip:
        if path == "two.mp4":
            second_started.set()
        return PreparedClip(torch.zeros(3, 4, 32, 32), [0, 1, 2, 3], (640, 360), "pyav")

    class Waiting(FixedModel):
        def encode_video(self, video: torch.Tensor) -> torch.Tensor:
            assert second_started.wait(timeout=240), "the second file was not decoded in the meantime"
            return super().encode_video(video)

    monkeypatch.setattr(predictor, "prepare_clip", load)
    results = Captioner(Waiting(CONFIG, [["red"]]), tokenizer).caption(["one.mp4", "two.mp4", "three.mp4"])
    assert [result.text for result in results] == ["red"] * 3


def test_results_come_one_by_one_and_no_file_is_read_too_early(loaded: list[str], captioner: Captioner) -> None:
    names = [f"{i}.mp4" for i in range(6)]
    results = captioner.caption(names)
    assert next(results).path == "0.mp4"
    assert set(loaded) <= set(names[:2])
    results.close()
    assert len(loaded) <= 2


def test_worker_processes_find_the_same(captioner: Captioner, tmp_path: Path) -> None:
    files = [write_clip(tmp_path / f"{seed}.mp4", "mpeg4", seed) for seed in range(4)]
    paths = [*files, tmp_path / "missing  file.mp4"]
    here = {result.path: result for result in captioner.caption(paths)}
    there = {result.path: result for result in captioner.caption(iter(paths), num_workers=2, timeout=120)}
    assert len(there) == 5
    for path, result in here.items():
        assert (there[path].text, there[path].error) == (result.text, result.error)
        assert list(there[path].seconds) == list(result.seconds)
    assert there[str(paths[-1])].error == "no such file"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"num_beams": 2, "num_return": 3}, "num_return must be from 1 to num_beams, 2; got 3"),
        ({"num_return": 0}, "num_return"),
        ({"max_length": 0}, "max_length must be from 1 to 32, got 0"),
        ({"max_length": 33}, "max_length must be from 1 to 32, got 33"),
        ({"min_length": 13}, "min_length must be from 0 to max_length, 12; got 13"),
        ({"min_length": -1}, "min_length"),
    ],
)
def test_options_are_checked_before_any_file_is_read(
    loaded: list[str], captioner: Captioner, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        captioner.caption("one.mp4", **options)
    assert loaded == []


def test_running_out_of_device_memory_names_remedies(loaded: list[str], tokenizer: Tokenizer) -> None:
    class Full(FixedModel):
        def encode_video(self, video: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError

    with pytest.raises(MPlug2Error, match="cpu ran out of memory: use a smaller dtype"):
        list(Captioner(Full(CONFIG, [["red"]]), tokenizer).caption("one.mp4"))


# --- answers ----------------------------------------------------------------------------------------------------------


def test_free_answers_are_what_the_model_generates(
    loaded: list[str], answerer: Answerer, model: mf.MPlug2ForQuestionAnswering, tokenizer: Tokenizer
) -> None:
    (result,) = answerer.answer("one.mp4", "What does the RED square do?", num_beams=2, num_return=2, max_length=4)
    words = "what does the red square do"
    ids = torch.tensor([[101, *(VOCABULARY.index(word) for word in words.split())]])
    output = model.generate(
        pixels("one.mp4")[None],
        question_ids=ids,
        question_mask=torch.ones_like(ids),
        num_beams=2,
        num_return=2,
        max_length=4,
    )
    assert [text for text, _ in result.alternatives] == [text for text, _ in hypotheses(tokenizer, output)]


def test_candidates_are_ranked_by_the_model(
    loaded: list[str], answerer: Answerer, model: mf.MPlug2ForQuestionAnswering, tokenizer: Tokenizer
) -> None:
    candidates = ["moves left", "up", "the red circle", "no"]
    results = list(answerer.answer(["one.mp4", "bad.mp4"], "what is it", candidates, num_return=3))
    assert results[1].error is not None
    indices, probabilities = model.rank_answers(
        pixels("one.mp4")[None],
        *tokenizer.encode(["what is it"], end=False),
        *tokenizer.encode(candidates, end=True),
        k=4,
    )
    expected = [candidates[i] for i in indices[0].tolist()][:3]
    assert [text for text, _ in results[0].alternatives] == expected
    assert [p for _, p in results[0].alternatives] == pytest.approx(probabilities[0, :3].tolist(), abs=1e-5)
    assert results[0].text == expected[0]


def test_more_candidates_than_are_scored_in_full(
    loaded: list[str], answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(question_answering, "MAX_CANDIDATES", 2)
    (two,) = answerer.answer("one.mp4", "what", ["yes", "no", "up"], num_return=1)
    (three,) = answerer.answer("one.mp4", "what", ["yes", "no", "up"], num_return=3)
    assert two.text == three.text
    assert {text for text, _ in three.alternatives} == {"yes", "no", "up"}
    assert two.score > three.score  # among two, the probabilities are larger than among three


@pytest.mark.parametrize(
    ("question", "candidates", "options", "message"),
    [
        ("?!", None, {}, "the question is empty"),
        ("what " * 51, None, {}, "has 51 words, at most 50"),
        ("what " * 40, None, {}, "the question has 41 tokens, and the model reads at most 32"),
        ("what", [], {}, "list of candidates is empty"),
        ("what", ["yes", " "], {}, "a candidate is empty"),
        ("what", "yes", {}, "must be a list"),
        ("what", ["yes " * 40], {}, "a candidate has 42 tokens"),
        ("what", ["yes"], {"num_return": 2}, "num_return must be from 1 to the 1 candidates, got 2"),
        ("what", ["yes"], {"num_beams": 2, "max_length": 3}, "num_beams, max_length: not used"),
        ("what", None, {"num_return": 9}, "num_return must be from 1 to num_beams"),
    ],
)
def test_questions_that_the_model_cannot_read(
    loaded: list[str],
    answerer: Answerer,
    question: str,
    candidates: list[str] | None,
    options: dict[str, int],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        answerer.answer("one.mp4", question, candidates, **options)
    assert loaded == []


def test_unknown_words_are_named(answerer: Answerer) -> None:
    assert answerer.unknown_words("What does the Hippopotamus, the zebra and the hippopotamus do?") == [
        "hippopotamus",
        "zebra",
        "and",
    ]
    assert answerer.unknown_words("What color is it?") == []


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model: mf.MPlug2ForQuestionAnswering, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "words.txt").write_text("\n".join(VOCABULARY) + "\n")
    return save_pretrained(model, folder / "qa", vocab=folder / "words.txt")


def test_both_tasks_load_a_question_answering_checkpoint(loaded: list[str], folder: Path, captioner: Captioner) -> None:
    read = Captioner.from_pretrained(folder, device="cpu")
    assert read.model.task == "captioning"
    assert read.tokenizer.vocab_size == len(VOCABULARY)
    assert next(read.caption("one.mp4")).alternatives == next(captioner.caption("one.mp4")).alternatives
    assert Answerer.from_pretrained(folder).model.task == "question_answering"


def test_a_checkpoint_and_a_model_are_two_ways_to_begin(
    loaded: list[str], folder: Path, captioner: Captioner, tokenizer: Tokenizer
) -> None:
    read = mf.Captioner(folder, device="cpu", dtype="bfloat16")
    assert next(read.model.parameters()).dtype == torch.bfloat16
    assert mf.Captioner(str(folder)).model.task == "captioning"
    for arguments, options, message in (
        ((captioner.model,), {}, "a model needs a tokenizer"),
        ((captioner.model, tokenizer), {"dtype": "bfloat16"}, "a model has its dtype and device"),
        ((folder, tokenizer), {}, "a checkpoint has its own vocabulary"),
    ):
        with pytest.raises(ConfigError, match=message):
            mf.Captioner(*arguments, **options)


def test_a_vocabulary_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(ConfigError, match=f"30522 tokens and the model has {len(VOCABULARY)}"):
        Captioner.from_pretrained(tmp_path)


def test_without_a_path_it_is_the_model_that_ships(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(predictor, "TINY_MODEL", folder)
    assert Captioner.from_pretrained().tokenizer.vocab_size == len(VOCABULARY)
    monkeypatch.setattr(predictor, "TINY_MODEL", folder / "none")
    with pytest.raises(CheckpointError, match="the tiny model is missing"):
        Captioner.from_pretrained()


class FixedModel(torch.nn.Module):
    """A task that always gives the same text."""

    def __init__(self, config: mf.MPlug2Config, texts: list[list[str]]) -> None:
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.ids = [[101, *(VOCABULARY.index(word) for word in text), 102] for text in texts]

    def encode_video(self, video: torch.Tensor) -> torch.Tensor:
        return video.flatten(1)[:, None]

    def predict(self, task: object, *, image_embeds: torch.Tensor, **_: int) -> mf.GenerationOutput:
        scores = -torch.arange(1.0, len(self.ids) + 1)[None]
        return mf.GenerationOutput(torch.tensor([self.ids]), scores)
