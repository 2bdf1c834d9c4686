"""What a metric is."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mplug2_fast.errors import ConfigError

Kind = Literal["text", "ranking", "number", "box"]
"""The kind of values that a metric compares. For each item:

| kind | prediction | reference |
| --- | --- | --- |
| text | a text; "" if the model has no result | right texts, each with its weight |
| ranking | texts or ids, best first | right texts or ids, each with its weight |
| number | a number | a number |
| box | (center x, center y, width, height), or None if the model has no result | a box |
"""

References = Mapping[str, float]
Box = tuple[float, float, float, float]

EXTRA = "evaluate"


@dataclass(frozen=True)
class Scores:
    """The values of one metric by name, and those of each item if the metric has them."""

    values: dict[str, float]
    items: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A metric. Its values are percentages, except `median_rank`.

    Attributes:
        name: in `METRICS`.
        kind: of its predictions and references.
        compute: from the predictions and references of all items to the scores.
        library: the distribution that computes it; None for this package.
        tokenized: the texts are tokenized first.
        java: it calls Java.
        opt_in: why it runs only if it is named.
        main: the value that decides between two models; empty if it is called as the metric.
    """

    name: str
    kind: Kind
    compute: Callable[[Sequence[Any], Sequence[Any]], Scores]
    library: str | None = None
    tokenized: bool = False
    java: bool = False
    opt_in: str | None = None
    main: str = ""

    def require(self) -> None:
        """Raises `ConfigError` if the library is not installed."""
        if self.library is not None and importlib.util.find_spec(self.library) is None:
            raise ConfigError(f"the metric {self.name} needs {self.library}: pip install 'mplug2-fast[{EXTRA}]'")

    def described(self) -> str:
        """The library and its version."""
        return f"{self.library} {importlib.metadata.version(self.library)}" if self.library else "mplug2_fast"


def load(module: str) -> Any:
    """A module of the optional dependencies. Raises `ConfigError` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(f"{package} cannot be imported ({error}): pip install 'mplug2-fast[{EXTRA}]'") from error


def percent(values: Sequence[float]) -> list[float]:
    return [100.0 * float(value) for value in values]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
