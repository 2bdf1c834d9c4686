"""Captions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from mplug2_fast.models.mplug2.config import Task
from mplug2_fast.predict.predictor import Paths, Result, Texts, VideoTask, Words


class Captioner(VideoTask):
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
        num_workers: int = 0,
        timeout: float | None = 60.0,
    ) -> Iterator[Result]:
        """One `Result` a file, each as soon as it is ready; in the order of the files, unless several processes decode.

        Args:
            paths: one file or several; an image is a video of one frame.
            num_beams: beams of the search; None takes the model's default, as for the lengths.
            num_return: how many captions a file, at most `num_beams`.
            min_length, max_length: of the caption, in tokens, the end token included and [CLS] not.
            num_workers: processes that decode, in which a file that takes its decoder down costs only itself; 0 decodes
                in a thread.
            timeout: seconds that decoding a file may take; None for no limit.

        Raises:
            ConfigError: options that contradict one another or the model.
            MPlug2Error: the device ran out of memory.
        """
        return self.run(paths, self.words(num_beams, num_return, min_length, max_length), num_workers, timeout)

    def words(
        self,
        num_beams: int | None = None,
        num_return: int = 1,
        min_length: int | None = None,
        max_length: int | None = None,
    ) -> Words:
        """What turns image_embeds into captions, with the options of `caption`. Raises `ConfigError`."""
        options = self.generation_options(num_beams, num_return, min_length, max_length)
        prompt = self.model.config.generation.prompt

        def words(image_embeds: Tensor) -> list[Texts]:
            return self.texts(self.model.generate(image_embeds=image_embeds, **options), prompt)

        return words
