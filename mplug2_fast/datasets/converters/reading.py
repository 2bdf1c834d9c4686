"""Reads annotation files: JSON, JSON Lines, tables, lists and pickles. Every error has the file and the place."""

from __future__ import annotations

import csv
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mplug2_fast.errors import DataError, printable

MAX_PICKLE_BYTES = 2**30
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
"""The first number in files of old versions of torch.save."""


class Record:
    """An object of an annotation file.

    Args:
        values: the object.
        file: the file, or the file and the line.
        place: where in the file or the line, such as `images[3]`.
    """

    def __init__(self, values: Any, file: str, place: str = "") -> None:
        self.file = file
        self.place = place
        if not isinstance(values, dict):
            raise self.error(f"must be an object with named fields, got {_shown(values)}")
        self.values = values

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def error(self, message: str) -> DataError:
        """An error about this object."""
        return DataError(f"{self.file}: {self.place}: {message}" if self.place else f"{self.file}: {message}")

    def text(self, *names: str) -> str:
        """The text of the first of these fields that exists, without surrounding white space."""
        name, value = self._value(names)
        if not isinstance(value, str):
            raise self.error(f"{name} must be a text, got {_shown(value)}")
        return value.strip()

    def name(self, *names: str) -> str:
        """The text or whole number of the first of these fields that exists, as a text."""
        name, value = self._value(names)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self.error(f"{name} must be a text or a whole number, got {_shown(value)}")
        return str(value)

    def number(self, *names: str) -> float:
        """The number of the first of these fields that exists. It may be a text, as in tables."""
        name, value = self._value(names)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.error(f"{name} must be a number, got {_shown(value)}")
        return number

    def texts(self, *names: str) -> tuple[str, ...]:
        """The texts of the first of these fields that exists: a list, or one text."""
        name, value = self._value(names)
        texts = value if isinstance(value, list | tuple) else [value]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise self.error(f"{name} must be a text or a list of texts, got {_shown(value)}")
        return tuple(text.strip() for text in texts)

    def lists(self, name: str) -> list[tuple[str, ...]]:
        """The lists of texts in a field that is a list of lists."""
        _, value = self._value((name,))
        if not isinstance(value, list) or not value:
            raise self.error(f"{printable(str(name), 80)} must be a list of lists of texts, got {_shown(value)}")
        return [Record({name: each}, self.file, self.place).texts(name) for each in value]

    def records(self, *names: str) -> Iterator[Record]:
        """The objects of a list."""
        name, value = self._value(names)
        return _records(value, self.file, f"{self.place}.{name}" if self.place else name)

    def choice(self, name: str, choices: dict[str, Any]) -> Any:
        """The entry of `choices` for the value of a field."""
        value = self.name(name)
        if value not in choices:
            raise self.error(f"{name} must be one of {', '.join(choices)}, got {_shown(value)}")
        return choices[value]

    def _value(self, names: Sequence[str]) -> tuple[str, Any]:
        for name in names:
            if name in self:
                return name, self.values[name]
        fields = ", ".join(printable(str(name), 40) for name in list(self.values)[:12]) or "no fields"
        raise self.error(f"has no {' or '.join(names)}; it has {fields}. Is this the right annotation file?")


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    with _opened(path) as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            place = f"{path}:{error.lineno}"
            raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}: download it again") from None
        except RecursionError:
            raise DataError(f"{path}: not an annotation file: its brackets are nested too deeply") from None


def json_object(path: Path) -> Record:
    """The object in a JSON file."""
    return Record(read_json(path), str(path))


def json_records(path: Path) -> Iterator[Record]:
    """The objects in the list of a JSON file."""
    return _records(read_json(path), str(path))


def json_lines(path: Path) -> Iterator[Record]:
    """The objects of a JSON Lines file."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not JSON: {error}: download it again") from None
            yield Record(value, f"{path}:{number}")


def json_either(path: Path) -> Iterator[Record]:
    """The objects in a JSON list or a JSON Lines file."""
    with _opened(path) as file:
        start = file.read(1000).lstrip()
    return json_records(path) if start.startswith("[") else json_lines(path)


def table(
    path: Path,
    delimiter: str,
    *,
    header: Sequence[str] | None = None,
    quotes: bool = False,
    on_wrong_width: Callable[[DataError], None] | None = None,
) -> Iterator[Record]:
    """The rows of a table with a line of column names, or without it and with the columns `header`.

    Args:
        quotes: whether cells may be quoted.
        on_wrong_width: called for a row with the wrong number of columns, which is then skipped. None raises the error.
    """
    with _opened(path) as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE)
        try:
            columns = list(header) if header else [name.strip() for name in next(reader)]
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if not row or row == [""]:
                    continue
                if len(row) != len(columns):
                    what = f"has {len(row)} columns, expected {len(columns)}: {', '.join(columns)}"
                    error = DataError(f"{where}: {printable(what)}")
                    if on_wrong_width is None:
                        raise error
                    on_wrong_width(error)
                    continue
                yield Record(dict(zip(columns, row, strict=True)), where)
        except StopIteration:
            raise DataError(f"{path}: is empty: download it again") from None
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not a table: {error}") from None


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of each line that is neither blank nor a comment."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip() and not line.startswith("#"):
                yield f"{path}:{number}", line.strip()


def read_pickle(path: Path) -> Any:
    """Reads a pickle or a file of torch.save that has only lists, dicts, texts and numbers."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inside = next((info for info in archive.infolist() if info.filename.endswith("data.pkl")), None)
                if inside is None or inside.file_size > MAX_PICKLE_BYTES:
                    raise DataError(f"{path}: not a file of torch.save: it has no data.pkl of a possible size")
                with archive.open(inside) as file:
                    return _PlainUnpickler(file, path).load()
        with path.open("rb") as file:
            value = _PlainUnpickler(file, path).load()
            if value == _TORCH_MAGIC:  # then the version and the platform come before the value
                for _ in range(3):
                    value = _PlainUnpickler(file, path).load()
            return value
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except DataError:
        raise
    except Exception as error:  # damaged pickles raise errors of every kind
        raise DataError(f"{path}: not a pickle: {printable(str(error), 100)}: download it again") from None


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        what = printable(f"{module}.{name}", 80)
        raise DataError(f"{self._path}: holds {what}, and only lists, dicts, texts and numbers are read from pickles")

    def persistent_load(self, _: Any) -> Any:
        raise DataError(f"{self._path}: holds tensors, and only lists, dicts, texts and numbers are read from pickles")


def pickled_records(path: Path) -> Iterator[Record]:
    """The dicts in the list of a pickle."""
    return _records(read_pickle(path), str(path))


def _records(value: Any, file: str, place: str = "") -> Iterator[Record]:
    if not isinstance(value, list) or not value:
        where = f"{file}: {place}" if place else file
        raise DataError(f"{where}: must be a list of objects, got {_shown(value)}")
    return (Record(each, file, f"{place}[{index}]") for index, each in enumerate(value))


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: is empty: download it again")
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}: save it as UTF-8") from None


def _shown(value: Any) -> str:
    return printable(repr(value), 80)
