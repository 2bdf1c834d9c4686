"""The report of an evaluation, and its files.

`report.json` has the metrics and the settings that decide them, `items.jsonl` one line per item with its prediction,
references and scores.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mplug2_fast.bulk.journal import read_lines, write_whole
from mplug2_fast.errors import DataError

REPORT_NAME = "report.json"
ITEMS_NAME = "items.jsonl"
PREDICTIONS_NAME = "predictions.jsonl"
PAGE_NAME = "report.html"


@dataclass(frozen=True)
class ItemResult:
    """The result of one item.

    Attributes:
        id, path, question: of the item.
        prediction: the first text; None if it failed.
        alternatives: further texts.
        references: right texts and their weights.
        scores: by name.
        frames: indices of the frames that the model saw.
        error: why it has no prediction.
    """

    id: str
    path: str | None
    prediction: str | None
    references: Mapping[str, float]
    scores: dict[str, float | None]
    question: str | None = None
    alternatives: tuple[str, ...] = ()
    frames: tuple[int, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Report:
    """An evaluation.

    Attributes:
        task: its name.
        metrics: name -> value; percentages, except `median_rank`.
        settings: everything that decides the metrics.
        libraries: metric -> library and version.
        left_out: metric -> why it was not computed.
        items: one by one.
    """

    task: str
    metrics: dict[str, float]
    settings: dict[str, Any]
    libraries: dict[str, str]
    left_out: dict[str, str]
    items: list[ItemResult] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """The number of items without a prediction."""
        return sum(item.error is not None for item in self.items)

    @property
    def main_score(self) -> str | None:
        """The first score that items have."""
        return next((name for item in self.items for name in item.scores), None)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes `report.json` and `items.jsonl`. Raises `MPlug2Error`."""
        fields = {name: value for name, value in vars(self).items() if name != "items"}
        lines = "".join(f"{json.dumps(_plain(asdict(item)))}\n" for item in self.items)
        write_whole(Path(folder) / ITEMS_NAME, lines.encode())
        write_whole(Path(folder) / REPORT_NAME, f"{json.dumps(_plain(fields), indent=2)}\n".encode())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Report:
        """A report from its folder, or from `report.json`. Without `items.jsonl` beside it, it has no items.

        Raises:
            DataError: there is no report, or it is something else.
        """
        file = Path(path) / REPORT_NAME if Path(path).is_dir() else Path(path)
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            report = cls(**fields)
            items = file.with_name(ITEMS_NAME)
            if items.exists():
                for line in read_lines(items):
                    report.items.append(
                        ItemResult(
                            **{**line, "alternatives": tuple(line["alternatives"]), "frames": tuple(line["frames"])}
                        )
                    )
        except OSError as error:
            raise DataError(f"{file}: no report can be read there: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{file}: this is not a report of mplug2-fast evaluate: {error}") from error
        return report


def _plain(value: Any) -> Any:
    """Numbers that JSON lacks become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
