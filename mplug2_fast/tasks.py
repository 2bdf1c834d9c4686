"""From files to words: captions of videos and images, and answers to questions about them.

    captioner = Captioner.from_pretrained("mplug2_caption.pth", dtype="bfloat16")
    for result in captioner.caption(["a.mp4", "b.mkv"]):
        print(result.path, result.text or result.error)

One bad file never stops the others: its `Result` carries an `error`. The next file is decoded in a thread while the
model works on the current one.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from mplug2_fast.checkpoint import from_pretrained, vocabulary_path
from mplug2_fast.config import Task
from mplug2_fast.devices import pick_device, pick_dtype
from mplug2_fast.errors import CheckpointError, ConfigError, MPlug2Error
from mplug2_fast.outputs import GenerationOutput
from mplug2_fast.text import Tokenizer, clean_question
from mplug2_fast.video import load_video

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")

TINY_MODEL = Path(__file__).parent / "data" / "tiny"
"""The model that ships: it knows the clips of examples/moving_shapes and nothing else."""

PathLike = str | os.PathLike[str]
Paths = PathLike | Iterable[PathLike]

MAX_CANDIDATES = 128
"""As many candidates as the released code keeps after the first token, to score them in full."""

MAX_QUESTION_WORDS = 50


class Alternative(NamedTuple):
    """One text for a file, and its score: see `Result`."""

    text: str
    score: float


@dataclass(frozen=True)
class Result:
    """What came out for one file: a text, or an error.

    `score` is the length-normalised log probability of a generated text, or the probability of a given candidate
    among the candidates. `alternatives` are the `num_return` best, best first, the text itself included.
    `seconds` has the wall time of each stage: `decode` (file to pixels), `encode` (pixels to visual tokens) and
    `generate` (tokens to words).
    """

    path: str
    text: str | None = None
    score: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None


class _VideoTask:
    """A model, its tokenizer, and the loop over files that both tasks share."""

    task: ClassVar[Task]

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        """Use a model that is already there, with the tokenizer that it was trained with."""
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load a checkpoint of any form that `mplug2_fast.from_pretrained` reads.

        Args:
            path: the checkpoint; None takes the tiny model that ships. A `vocab.txt` in a directory is the vocabulary,
                otherwise it is that of bert-base-uncased.
            dtype: a dtype or its name; None or "auto": see `pick_dtype`.
            device: a device or its name; None or "auto": see `pick_device`.

        Raises:
            CheckpointError: the checkpoint cannot be read, or is not one of this task.
            ConfigError: no such device or dtype, or a vocabulary that does not fit the model.
        """
        device = pick_device(device)
        dtype = pick_dtype(dtype, device)
        if path is None and not TINY_MODEL.exists():
            raise CheckpointError(f"{TINY_MODEL}: the tiny model is not there: reinstall, or name a checkpoint")
        path = TINY_MODEL if path is None else Path(path)
        model = from_pretrained(path, task=cls.task, dtype=dtype, device=device)
        tokenizer = Tokenizer.from_vocab(vocabulary_path(path), vocab_size=model.config.text.vocab_size)
        return cls(model, tokenizer)

    def _run(self, paths: Paths, words: Callable[[Tensor], list[Alternative]]) -> Iterator[Result]:
        """One `Result` a path, in order; `words` turns image_embeds `(1, S, D)` into texts, best first."""
        for path, decoded in _one_ahead(self._decode, _as_list(paths)):
            video, decoding, error = decoded.result()
            if video is None:
                yield Result(path, seconds={"decode": decoding}, error=error)
            else:
                found, encoding, generating = self._words(video, words)
                seconds = {"decode": decoding, "encode": encoding, "generate": generating}
                yield Result(path, *found[0], tuple(found), seconds)

    @torch.inference_mode()
    def _words(
        self, video: Tensor, words: Callable[[Tensor], list[Alternative]]
    ) -> tuple[list[Alternative], float, float]:
        """(texts, seconds of encoding, seconds of generating) of a video `(1, 3, T, H, W)`."""
        weights = next(self.model.parameters())
        started = time.perf_counter()
        try:
            image_embeds = self.model.encode_video(video.to(weights.device, weights.dtype))
            if weights.is_cuda:
                torch.cuda.synchronize(weights.device)
            encoded = time.perf_counter()
            found = words(image_embeds)
        except torch.OutOfMemoryError as error:
            raise MPlug2Error(
                f"{weights.device} ran out of memory: use a smaller dtype, fewer beams, or the CPU"
            ) from error
        return found, encoded - started, time.perf_counter() - encoded

    def _decode(self, path: str) -> tuple[Tensor | None, float, str | None]:
        """(video, seconds, None) of a good file, (None, seconds, reason) of a bad one."""
        started = time.perf_counter()
        vision = self.model.config.vision
        video, error = None, None
        try:
            video = load_video(path, num_frames=vision.num_frames, image_size=vision.image_size)[None]
        except (MPlug2Error, OSError, ValueError, RuntimeError, MemoryError) as problem:
            reason = str(problem) or type(problem).__name__
            error = " ".join(reason.removeprefix(f"{path}: ").split())
        return video, time.perf_counter() - started, error

    def _generation_options(
        self, num_beams: int | None, num_return: int, min_length: int | None, max_length: int | None
    ) -> dict[str, int]:
        """The options of `model.generate`, with the model's defaults filled in. Raises `ConfigError`."""
        defaults, positions = self.model.config.generation, self.model.config.text.max_position_embeddings
        shortest, longest = defaults.lengths(self.task)
        beams = defaults.num_beams if num_beams is None else num_beams
        shortest = shortest if min_length is None else min_length
        longest = longest if max_length is None else max_length
        _require(beams >= 1, f"num_beams must be at least 1, got {beams}")
        _require(1 <= num_return <= beams, f"num_return must be from 1 to num_beams, {beams}; got {num_return}")
        _require(1 <= longest <= positions, f"max_length must be from 1 to {positions}, got {longest}")
        _require(0 <= shortest <= longest, f"min_length must be from 0 to max_length, {longest}; got {shortest}")
        return {"num_beams": beams, "num_return": num_return, "min_length": shortest, "max_length": longest}

    def _texts(self, output: GenerationOutput, prompt: str = "") -> list[Alternative]:
        """The hypotheses of a batch of one, without the rows that only pad."""
        rows = zip(output.sequences[0].tolist(), output.scores[0].tolist(), strict=True)
        return [Alternative(self.tokenizer.decode_caption(ids, prompt), score) for ids, score in rows if ids[0] >= 0]


class Captioner(_VideoTask):
    """Captions of video and image files."""

    task: ClassVar[Task] = "captioning"

    def caption(
        self,
        paths: Paths,
        *,
        num_beams: int | None = None,
        num_return: int = 1,
        min_length: int | None = None,
        max_length: int | None = None,
    ) -> Iterator[Result]:
        """One `Result` a file, in the order of the files, each as soon as it is ready.

        Args:
            paths: one file or several; an image is a video of one frame.
            num_beams: beams of the search; None takes the model's default, as for the lengths.
            num_return: how many captions a file, at most `num_beams`.
            min_length, max_length: of the caption, in tokens, the end token included and [CLS] not.

        Raises:
            ConfigError: options that contradict one another or the model.
            MPlug2Error: the device ran out of memory.
        """
        options = self._generation_options(num_beams, num_return, min_length, max_length)
        prompt = self.model.config.generation.prompt

        def words(image_embeds: Tensor) -> list[Alternative]:
            return self._texts(self.model.generate(image_embeds=image_embeds, **options), prompt)

        return self._run(paths, words)


class Answerer(_VideoTask):
    """Answers to a question about video and image files."""

    task: ClassVar[Task] = "question_answering"

    def answer(
        self,
        paths: Paths,
        question: str,
        candidates: Sequence[str] | None = None,
        *,
        num_beams: int | None = None,
        num_return: int = 1,
        min_length: int | None = None,
        max_length: int | None = None,
    ) -> Iterator[Result]:
        """One `Result` a file, in the order of the files, each as soon as it is ready.

        Args:
            paths: one file or several, each asked the same question.
            question: at most 50 words; it is cleaned up as the released datasets do.
            candidates: the answers to choose from; None writes an answer freely, by beam search.
            num_beams, min_length, max_length: of the beam search, as in `Captioner.caption`; not with candidates.
            num_return: how many answers a file, at most `num_beams`, or at most the number of candidates.

        Raises:
            ConfigError: a question or candidates that the model cannot read, or options that contradict one another.
            MPlug2Error: the device ran out of memory.
        """
        asked = self._question(question)
        if candidates is not None:
            searching = {"num_beams": num_beams, "min_length": min_length, "max_length": max_length}
            given = [name for name, value in searching.items() if value is not None]
            _require(not given, f"{', '.join(given)}: of no use when the answer is chosen from candidates")
            return self._run(paths, self._chooser(asked, candidates, num_return))
        options = self._generation_options(num_beams, num_return, min_length, max_length)

        def words(image_embeds: Tensor) -> list[Alternative]:
            ids, mask = (tensor.to(image_embeds.device) for tensor in asked)
            found = self.model.generate(image_embeds=image_embeds, question_ids=ids, question_mask=mask, **options)
            return self._texts(found)

        return self._run(paths, words)

    def _chooser(
        self, asked: tuple[Tensor, Tensor], candidates: Sequence[str], num_return: int
    ) -> Callable[[Tensor], list[Alternative]]:
        """What turns image_embeds into the best of the candidates."""
        inputs = [*asked, *self._candidates(candidates)]
        count = len(candidates)
        _require(1 <= num_return <= count, f"num_return must be from 1 to the {count} candidates, got {num_return}")
        k = min(count, max(MAX_CANDIDATES, num_return))

        def words(image_embeds: Tensor) -> list[Alternative]:
            tensors = [tensor.to(image_embeds.device) for tensor in inputs]
            indices, probabilities = self.model.rank_answers(None, *tensors, k, image_embeds=image_embeds)
            best = zip(indices[0].tolist(), probabilities[0].tolist(), strict=True)
            return [Alternative(candidates[i], probability) for i, probability in best][:num_return]

        return words

    def unknown_words(self, question: str) -> list[str]:
        """The words of a question that the model's vocabulary lacks: to the model they all look the same."""
        return self.tokenizer.unknown_words(clean_question(question))

    def _question(self, question: str) -> tuple[Tensor, Tensor]:
        words = len(question.split())
        _require(bool(clean_question(question).strip()), "the question is empty")
        _require(words <= MAX_QUESTION_WORDS, f"the question has {words} words, at most {MAX_QUESTION_WORDS} are read")
        ids, mask = self.tokenizer.encode_questions([question])
        self._require_positions("the question", ids)
        return ids, mask

    def _candidates(self, candidates: Sequence[str]) -> tuple[Tensor, Tensor]:
        _require(not isinstance(candidates, str), "candidates must be a list of answers, not one text")
        _require(len(candidates) > 0, "the list of candidates is empty")
        _require(all(candidate.strip() for candidate in candidates), "a candidate is empty")
        ids, mask = self.tokenizer.encode_answers(candidates)
        self._require_positions("a candidate", ids)
        return ids, mask

    def _require_positions(self, what: str, ids: Tensor) -> None:
        positions = self.model.config.text.max_position_embeddings
        _require(
            ids.shape[1] <= positions, f"{what} has {ids.shape[1]} tokens, and the model reads at most {positions}"
        )


def _one_ahead(work: Callable[[str], _T], paths: Sequence[PathLike]) -> Iterator[tuple[str, Future[_T]]]:
    """(path, future of `work(path)`) in order; while one is consumed, the next is worked on in a thread."""
    pending: deque[tuple[str, Future[_T]]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as pool:
        for path in paths:
            name = os.fspath(path)
            pending.append((name, pool.submit(work, name)))
            if len(pending) > 1:
                yield pending.popleft()
        yield from pending


def _as_list(paths: Paths) -> list[PathLike]:
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
