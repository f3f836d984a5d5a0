"""Data sets, a row at a time, in bounded memory, and with the line of whatever is wrong.

CSV, TSV, JSON Lines and JSON need nothing further; Parquet needs the extra `data`. A data set is read twice, once to
check every row and once to run them, so whatever can be read only once is spooled to a temporary file first.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]
from pydantic_core import to_json

from prefect_crew.api.errors import CrewError

__all__ = ["Dataset", "DatasetError", "DatasetFormat", "Row", "open_dataset"]

DatasetFormat = Literal["csv", "tsv", "jsonl", "json", "parquet"]
_ENDINGS: dict[str, DatasetFormat] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".lzma", ".zip"}
_files = cast("Any", fsspec)
_CHUNK = 1 << 20
_SLICE = 5_000
"""Rows of a frame or a Parquet file that are held at once."""


class DatasetError(CrewError):
    """A data set cannot be read. Attributes: source (its name), line (1-based, None where there is none)."""

    def __init__(self, reason: str, *, source: str, line: int | None = None) -> None:
        self.reason = reason
        self.source = source
        self.line = line
        where = source if line is None else f"{source}, line {line}"
        super().__init__(f"{where}: {reason} Nothing of this data set was started.")


@dataclass(frozen=True)
class Row:
    """One row. `line` is that of the file, 1-based, or the row's number where there is no file."""

    line: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Dataset:
    """Rows that can be read again and again. `name` is for people."""

    name: str
    rows: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.rows()


def open_dataset(source: Any, *, format: DatasetFormat | None = None, encoding: str = "utf-8-sig") -> Dataset:  # noqa: A002
    """Return a data set.

    Args:
        source: A path, a URL or any fsspec address, compressed if its ending says so; an iterable of mappings; a pandas
            or polars data frame, or an Arrow table.
        format: The format of a file whose name does not tell it.
        encoding: That of a text file, one in which a line ends with the byte 10.

    Raises:
        DatasetError: The format is unknown, the extra is missing, or there is no such file. What is wrong within it is
            raised while it is read.
    """
    if isinstance(source, str | os.PathLike):
        address = os.fspath(cast("str | os.PathLike[str]", source))
        return _of_file(address, format or _format_of(address), encoding)
    kind: type[Any] = cast("Any", type)(source)
    module = kind.__module__.partition(".")[0]
    if module in _FRAMES:
        return Dataset(f"{module} {kind.__name__}", lambda: _FRAMES[module](source))
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DatasetError(
            f"A {kind.__name__} is no data set: give a path, an iterable of mappings, or a data frame.",
            source="data set",
        )
    rows = cast("Iterable[Any]", source)
    name = f"{kind.__name__} of rows"
    if isinstance(rows, list | tuple):
        return Dataset(name, lambda: _of_mappings(rows, name))
    return _spooled(rows, name)


def _format_of(address: str) -> DatasetFormat:
    path = address.partition("?")[0]
    stem, ending = os.path.splitext(path)  # noqa: PTH122  an address is not always a path
    if ending.lower() in _COMPRESSED:
        ending = os.path.splitext(stem)[1]  # noqa: PTH122
    found = _ENDINGS.get(ending.lower())
    if found is None:
        known = ", ".join(sorted(_ENDINGS))
        raise DatasetError(f"the ending {ending!r} tells no format. Known: {known}; or give format=…", source=address)
    return found


def _of_file(address: str, kind: DatasetFormat, encoding: str) -> Dataset:
    if kind == "parquet":
        return Dataset(address, lambda: _parquet(address))
    readers: dict[str, Callable[[Iterator[str], str], Iterator[Row]]] = {
        "csv": lambda lines, name: _csv(lines, name, ","),
        "tsv": lambda lines, name: _csv(lines, name, "\t"),
        "jsonl": _jsonl,
    }

    def rows() -> Iterator[Row]:
        with _opened(address) as file:
            if kind == "json":
                yield from _json(file, address, encoding)
            else:
                yield from readers[kind](_lines(file, address, encoding), address)

    return Dataset(address, rows)


@contextmanager
def _opened(address: str) -> Generator[IO[bytes]]:
    try:
        opened = _files.open(address, "rb", compression="infer")
        with opened as file:
            yield file
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DatasetError(f"cannot be opened: {error.strerror or error}.", source=address) from None
    except (OSError, EOFError, ImportError) as error:
        raise DatasetError(f"cannot be read: {type(error).__name__}: {error}.", source=address) from error


def _lines(file: IO[bytes], name: str, encoding: str) -> Iterator[str]:
    for number, raw in enumerate(file, start=1):
        try:
            # A byte-order mark stands on the first line only; elsewhere it would be text.
            yield raw.decode(encoding if number == 1 else encoding.removesuffix("-sig"))
        except UnicodeDecodeError as error:
            shown = raw[error.start : error.end][:8].hex(" ")
            raise DatasetError(
                f"the bytes {shown} are not {encoding}. Give the file's encoding=….", source=name, line=number
            ) from None


def _csv(lines: Iterator[str], name: str, delimiter: str) -> Iterator[Row]:
    # The limit of 131,072 characters a field is a process-wide default from 1999; documents are longer.
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise DatasetError("is empty: it has no header line.", source=name)
        doubled = sorted({column for column in header if header.count(column) > 1})
        if doubled:
            raise DatasetError(f"the columns {', '.join(doubled)} are there twice.", source=name, line=1)
        start = reader.line_num + 1
        for fields in reader:
            line, start = start, reader.line_num + 1
            if not fields:
                continue
            if len(fields) != len(header):
                raise DatasetError(f"has {len(fields)} fields, the header has {len(header)}.", source=name, line=line)
            yield Row(line, dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise DatasetError(f"is no CSV: {error}.", source=name, line=reader.line_num) from None


def _jsonl(lines: Iterator[str], name: str) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"is no JSON: {error}.", source=name, line=number) from None
        yield _row(value, name, number)


def _row(value: Any, name: str, line: int) -> Row:
    if not isinstance(value, Mapping):
        raise DatasetError(f"holds a {type(value).__name__}, not an object with inputs.", source=name, line=line)
    return Row(line, {str(key): item for key, item in cast("Mapping[Any, Any]", value).items()})


def _json(file: IO[bytes], name: str, encoding: str) -> Iterator[Row]:
    """Yield the objects of a JSON array one by one; a file of one object is one row."""
    text = _Text(file, name, encoding)
    first = text.peek()
    if first == "{":
        yield _row(text.value(), name, 1)
    elif first == "[":
        text.skip()
        while (char := text.peek()) != "]":
            if char == "":
                raise DatasetError("ends in the middle of its array.", source=name, line=text.line)
            line = text.line
            yield _row(text.value(), name, line)
            if text.peek() == ",":
                text.skip()
            elif text.peek() != "]":
                raise DatasetError("is no JSON: expected ',' or ']'.", source=name, line=text.line)
        text.skip()
    else:
        raise DatasetError("is empty." if first == "" else "is no JSON array of objects.", source=name, line=text.line)
    if text.peek():
        raise DatasetError("has something after its end.", source=name, line=text.line)


class _Text:
    """A text file read in pieces, from which whole JSON values are taken."""

    def __init__(self, file: IO[bytes], name: str, encoding: str) -> None:
        self._lines = _lines(file, name, encoding)
        self._name = name
        self._buffer = ""
        self._decoder = json.JSONDecoder()
        self.line = 1

    def _more(self) -> bool:
        """Read on; at least as much again as is held, so that one long value is not parsed over and over."""
        wanted = max(_CHUNK, len(self._buffer))
        pieces = [self._buffer]
        size = 0
        for line in self._lines:
            pieces.append(line)
            size += len(line)
            if size >= wanted:
                break
        self._buffer = "".join(pieces)
        return size > 0

    def peek(self) -> str:
        """Return the next character that is no white space, "" at the end."""
        while True:
            stripped = self._buffer.lstrip(" \t\r\n")
            self.line += self._buffer.count("\n", 0, len(self._buffer) - len(stripped))
            self._buffer = stripped
            if stripped:
                return stripped[0]
            if not self._more():
                return ""

    def skip(self) -> None:
        self._buffer = self._buffer[1:]

    def value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer)
            except (ValueError, RecursionError) as error:
                # Cut off or wrong: the rest of the file decides.
                if isinstance(error, RecursionError) or not self._more():
                    raise DatasetError(f"is no JSON: {error}.", source=self._name, line=self.line) from None
                continue
            self.line += self._buffer.count("\n", 0, end)
            self._buffer = self._buffer[end:]
            return value


def _of_mappings(rows: Iterable[Any], name: str) -> Iterator[Row]:
    for number, value in enumerate(rows, start=1):
        yield _row(value, name, number)


def _spooled(rows: Iterable[Any], name: str) -> Dataset:
    """Write rows that can be read only once to a file that goes with this process."""
    spool = tempfile.TemporaryFile("w+b", prefix="prefect-crew-")  # noqa: SIM115  lives as long as the data set
    for row in _of_mappings(rows, name):
        spool.write(to_json(row.values) + b"\n")
    spool.flush()

    def again() -> Iterator[Row]:
        # Each reader has a position of its own in the file.
        position = 0
        number = 0
        while True:
            spool.seek(position)
            line = spool.readline()
            if not line:
                return
            position = spool.tell()
            number += 1
            yield Row(number, json.loads(line))

    return Dataset(name, again)


def _polars() -> Any:
    try:
        return importlib.import_module("polars")
    except ImportError:
        raise DatasetError(
            "needs polars: pip install 'prefect-crew[data]'.", source="a Parquet file or a data frame"
        ) from None


def _parquet(address: str) -> Iterator[Row]:
    polars = _polars()
    local = address
    if "://" in address and not address.startswith("file://"):
        local = str(_files.open_local(f"simplecache::{address}"))
    if not Path(local.removeprefix("file://")).is_file():
        raise DatasetError("cannot be opened: there is no such file.", source=address)
    try:
        scan = polars.scan_parquet(local.removeprefix("file://"))
        number = 0
        while True:
            part = scan.slice(number, _SLICE).collect()
            for values in part.iter_rows(named=True):
                number += 1
                yield Row(number, values)
            if len(part) < _SLICE:
                return
    except polars.exceptions.PolarsError as error:
        raise DatasetError(f"is no Parquet file: {error}.", source=address) from None


def _polars_frame(frame: Any) -> Iterator[Row]:
    whole = frame.collect() if hasattr(frame, "collect") else frame
    for number, values in enumerate(whole.iter_rows(named=True), start=1):
        yield Row(number, values)


def _pandas_frame(frame: Any) -> Iterator[Row]:
    number = 0
    for start in range(0, len(frame), _SLICE):
        part = frame.iloc[start : start + _SLICE]
        part = part.astype(object).where(part.notna(), None)
        for values in part.to_dict("records"):
            number += 1
            yield Row(number, {str(key): value for key, value in values.items()})


def _arrow_table(table: Any) -> Iterator[Row]:
    number = 0
    for batch in table.to_batches(max_chunksize=_SLICE):
        for values in batch.to_pylist():
            number += 1
            yield Row(number, values)


_FRAMES: dict[str, Callable[[Any], Iterator[Row]]] = {
    "polars": _polars_frame,
    "pandas": _pandas_frame,
    "pyarrow": _arrow_table,
}
